"""METEOR 1.5 in a persistent Java process."""

import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pycocoevalcap.meteor import meteor as pycoco_meteor

from .clip_scores import ClipScores
from .tokenization import JAVA_MISSING, JAVA_OPTIONS, find_java, java_message, single_line


class MeteorScorer:
    """METEOR 1.5 in a Java process that scores any number of corpora.

    The constructor starts the process, which loads its paraphrase table in about 8 s, and does not wait for it. Close
    the scorer, or use it as a context manager.

    Args:
        java: path of the Java launcher, or "auto" (PATH).
        timeout: seconds after which the process is stopped if it has not scored a corpus.

    Raises:
        RuntimeError: Java is not found.
    """

    def __init__(self, java: str | None = "auto", timeout: float = 600.0):
        launcher = find_java(java)
        if launcher is None:
            raise RuntimeError(f"METEOR {JAVA_MISSING}")
        self.timeout = timeout
        self._lines: dict[str, str] = {}
        # A file, not a pipe: a pipe of error messages that is not read would fill up and block the process.
        self._errors = tempfile.TemporaryFile()
        jar = Path(pycoco_meteor.__file__).with_name(pycoco_meteor.METEOR_JAR)
        command = [launcher, "-Xmx2G", *JAVA_OPTIONS, "-jar", str(jar)]
        self._process = subprocess.Popen(
            [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self._finalizer = weakref.finalize(self, _stop, self._process, self._errors)

    def __enter__(self) -> "MeteorScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the Java process. A second call does nothing."""
        self._finalizer()

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> ClipScores:
        """Computes METEOR of a tokenized corpus (Denkowski & Lavie 2014).

        Raises:
            RuntimeError: the Java process exited or took longer than ``timeout``.
        """
        if not self._finalizer.alive:
            raise RuntimeError("the METEOR process is closed")
        requests = [_request(*pair) for pair in zip(predictions, references, strict=True)]
        # Systems often give the same captions, and the statistics of a pair do not depend on the corpus.
        unseen = [request for request in dict.fromkeys(requests) if request not in self._lines]
        self._lines.update(zip(unseen, self._exchange(unseen), strict=True))
        statistics = np.array([self._lines[request].split() for request in requests], dtype=np.float64)
        # METEOR adds up the chunks of a corpus without those of captions that match as a whole.
        whole = (statistics[:, 20] == 1) & (statistics[:, :2] == statistics[:, 21:23]).all(-1)
        statistics[whole, 20] = 0
        return ClipScores(statistics, "meteor")

    def _exchange(self, requests: Sequence[str]) -> list[str]:
        """Writes the requests in a thread and reads the answers in this one, so neither pipe can fill up and block."""
        writer = threading.Thread(target=self._write, args=(requests,), daemon=True)
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        watchdog = threading.Timer(self.timeout, give_up)
        watchdog.daemon = True
        watchdog.start()
        writer.start()
        answers = []
        try:
            while len(answers) < len(requests):
                line = self._process.stdout.readline()
                if not line:
                    # The output is closed, but the process may continue until the watchdog stops it.
                    words = self._last_words()
                    if late.is_set():
                        raise RuntimeError(f"METEOR took longer than {self.timeout:g} s and was stopped")
                    raise RuntimeError(f"the METEOR process exited: {words}")
                answers.append(line.strip())
        finally:
            watchdog.cancel()
            writer.join(timeout=5.0)
        return answers

    def _write(self, requests: Sequence[str]) -> None:
        try:
            self._process.stdin.writelines(f"{request}\n" for request in requests)
            self._process.stdin.flush()
        except OSError:
            # The process has exited; the reader reports it.
            pass

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        return java_message(self._errors.read()) or f"exit code {self._process.returncode}"


def _stop(process: subprocess.Popen, errors: BinaryIO) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors):
        try:
            stream.close()
        except OSError:
            # Closing flushes input that the stopped process does not read.
            pass


def _request(prediction: str, references: Sequence[str]) -> str:
    # "|||" separates fields and a line break ends the request, so the text must not contain them.
    fields = [single_line(text.replace("|||", " ")) for text in (*references, prediction)]
    return " ||| ".join(["SCORE", *fields])
