"""Files of scores: metrics of a system on a corpus, and the scores of every clip, from which systems are compared."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dali_llava.atomic import write_text

from .bootstrap import PairedTest, intervals, paired_test
from .caption_metrics import Scored
from .metrics.clip_scores import REDUCTIONS, ClipScores


REMEDY = "give a file of `dali-llava score`, or OUT.captions/*.scores.json of `dali-llava evaluate`"


def score_record(scored: Scored, references: Mapping[str, Sequence[str]], tokenizer: str) -> dict:
    """The content of a file of scores: metrics with 95% intervals, and the scores of every clip.

    `clips` has the ids and, by metric, the score of each clip. `statistics` has what the score of a corpus is computed
    from, for the metrics that are not the mean of the scores of the clips.
    """
    found = intervals(scored.clips)
    clips = {name: [None if np.isnan(x) else x for x in one.clips.tolist()] for name, one in scored.clips.items()}
    statistics = {
        name: {"reduction": one.reduction, "values": one.statistics.tolist()}
        for name, one in scored.clips.items()
        if one.reduction != "ratio" or (one.statistics[:, 1] != 1).any()
    }
    return {
        "n": len(references),
        "tokenizer": tokenizer,
        "metrics": scored.metrics,
        "intervals": {name: list(interval) for name, interval in found.items()},
        "reason": scored.reasons,
        "references_digest": _digest(references),
        "clips": {"id": list(references)} | clips,
        "statistics": statistics,
    }


def _digest(references: Mapping[str, Sequence[str]]) -> str:
    """A hash of the references, which does not depend on the order of the clips."""
    return hashlib.sha256(json.dumps(sorted((i, list(c)) for i, c in references.items())).encode()).hexdigest()[:16]


def write_scores(path: str | os.PathLike, record: Mapping) -> None:
    """Write a file of scores atomically, one field a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in record.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


@dataclass(frozen=True)
class SystemScores:
    """
    The scores of the clips of a system.

    Attributes:
        name: path of the file.
        ids: the clips.
        clips: statistics of each clip by metric, in the order of `ids`.
        tokenizer: the tokenizer of the captions.
        references_digest: hash of the references.
    """

    name: str
    ids: list[str]
    clips: dict[str, ClipScores]
    tokenizer: str
    references_digest: str


def read_scores(path: str | os.PathLike) -> SystemScores:
    """Read a file of scores.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has no scores of clips, or they are incomplete. The message names the file and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {REMEDY}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        columns, statistics = dict(record["clips"]), record["statistics"]
        ids = columns.pop("id")
        if len(set(ids)) < len(ids):
            raise ValueError("an id appears twice")
        clips = {}
        for name, column in columns.items():
            if name in statistics:
                stored = statistics[name]
                if stored["reduction"] not in REDUCTIONS:
                    raise ValueError(f"unknown reduction {stored['reduction']!r}")
                clips[name] = ClipScores(np.array(stored["values"], dtype=np.float64), stored["reduction"])
            else:
                clips[name] = ClipScores.mean(column)
            if len(clips[name].statistics) != len(ids):
                raise ValueError(f"{len(clips[name].statistics)} scores of {name} for {len(ids)} clips")
        return SystemScores(str(path), ids, clips, record["tokenizer"], record["references_digest"])
    except KeyError as error:
        raise ValueError(f"{path}: no scores of clips, {error.args[0]!r} is missing; {REMEDY}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of scores ({error}); {REMEDY}") from error


def compare_systems(a: SystemScores, b: SystemScores) -> dict[str, PairedTest]:
    """
    Test the difference of two systems on the same clips, by metric that both have.

    Raises:
        ValueError: the systems have other clips, references or tokenizers, or no metric in common.
    """
    only_a, only_b = ([i for i in x.ids if i not in set(y.ids)] for x, y in ((a, b), (b, a)))
    if only_a or only_b:
        sides = [
            f"{len(only)} only in {x.name}, such as {only[0]!r}" for x, only in ((a, only_a), (b, only_b)) if only
        ]
        raise ValueError(f"the systems have different clips: {'; '.join(sides)}; score both on the same clips")
    for what, of_a, of_b in (
        ("references", a.references_digest, b.references_digest),
        ("tokenizers", a.tokenizer, b.tokenizer),
    ):
        if of_a != of_b:
            raise ValueError(
                f"{a.name} and {b.name} were scored with different {what} ({of_a}, {of_b}); score both the same way"
            )
    shared = [name for name in a.clips if name in b.clips]
    if not shared:
        raise ValueError(f"{a.name} and {b.name} have no metric in common; score both with the same --metrics")
    row = {clip: index for index, clip in enumerate(b.ids)}
    order = [row[clip] for clip in a.ids]
    return {
        name: paired_test(a.clips[name], ClipScores(b.clips[name].statistics[order], b.clips[name].reduction))
        for name in shared
    }
