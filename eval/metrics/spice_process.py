"""SPICE under Java. It needs Stanford CoreNLP 3.6.0, which no Python package contains."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.spice import spice as pycoco_spice

from .clip_scores import ClipScores
from .tokenization import JAVA_MISSING, JAVA_OPTIONS, java_message


CORENLP_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
CORENLP_VARIABLE = "CORENLP_HOME"
CORENLP_MISSING = (
    f"needs Stanford CoreNLP 3.6.0: download stanford-corenlp-full-2015-12-09.zip and set {CORENLP_VARIABLE} "
    "to the unpacked folder"
)


def find_corenlp(folder: str | os.PathLike | None = None) -> Path | None:
    """Finds the folder with the two jars of Stanford CoreNLP 3.6.0.

    Args:
        folder: folder to search at any depth. By default, ``$CORENLP_HOME``, or else the folder of pycocoevalcap and
            the cache of aac-metrics, where these packages put the jars.

    Returns:
        The folder, or None if the jars are not found.

    Raises:
        FileNotFoundError: the folder in the argument or the variable does not contain the jars.
    """
    named = folder or os.environ.get(CORENLP_VARIABLE)
    if named:
        found = _holder(Path(named))
        if found is None:
            raise FileNotFoundError(
                f"{named}: does not contain {CORENLP_JARS[0]} and {CORENLP_JARS[1]}; SPICE {CORENLP_MISSING}"
            )
        return found
    cache = Path(os.environ.get("AAC_METRICS_CACHE_PATH", Path.home() / ".cache"))
    for candidate in (Path(pycoco_spice.__file__).parent / "lib", cache / "aac-metrics"):
        found = _holder(candidate)
        if found is not None:
            return found
    return None


def require_programs(java: str | None, corenlp: Path | None) -> tuple[str, Path]:
    """The two, if neither is None.

    Raises:
        RuntimeError: Java or CoreNLP is missing.
    """
    if java is None or corenlp is None:
        raise RuntimeError(CORENLP_MISSING if java else f"{JAVA_MISSING}; also {CORENLP_MISSING}")
    return java, corenlp


def _holder(folder: Path) -> Path | None:
    for jar in sorted(folder.rglob(CORENLP_JARS[0])):
        if jar.with_name(CORENLP_JARS[1]).is_file():
            return jar.parent
    return None


def spice(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    java: str,
    corenlp: Path,
    max_memory: str = "8G",
) -> ClipScores:
    """F-scores of SPICE of tokenized captions (Anderson et al. 2016, the authors' SPICE 1.0).

    Args:
        predictions: one tokenized caption per clip.
        references: tokenized reference captions of each clip.
        java: path of the Java launcher; SPICE 1.0 is written for Java 8.
        corenlp: the folder from :func:`find_corenlp`.
        max_memory: maximum heap size of the Java process.

    Raises:
        RuntimeError: the Java process fails.
    """
    entries = [
        {"image_id": index, "test": prediction, "refs": list(captions)}
        for index, (prediction, captions) in enumerate(zip(predictions, references, strict=True))
    ]
    home = Path(pycoco_spice.__file__).parent
    # The class path in the manifest of SPICE contains the other libraries.
    class_path = os.pathsep.join([str(home / pycoco_spice.SPICE_JAR), *(str(corenlp / jar) for jar in CORENLP_JARS)])
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "in.json"), Path(scratch, "out.json")
        asked.write_text(json.dumps(entries), encoding="utf-8")
        command = [java, f"-Xmx{max_memory}", *JAVA_OPTIONS, "-cp", class_path, "edu.anu.spice.SpiceScorer"]
        process = subprocess.run(
            [*command, str(asked), "-out", str(answered), "-silent"], capture_output=True, cwd=scratch
        )
        if process.returncode or not answered.is_file():
            raise RuntimeError(f"SPICE failed under {java}: {java_message(process.stderr) or 'no message'}")
        scores = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(answered.read_text("utf-8"))}
    if len(scores) < len(entries):
        raise RuntimeError(f"SPICE scored {len(scores)} of {len(entries)} captions")
    return ClipScores.mean([scores[index] for index in range(len(entries))])
