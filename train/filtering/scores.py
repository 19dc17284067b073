"""The pre-filter's folder: scores kept in parts as they come, so that a run can go on, and the lists made of them.

settings.json      what the scores depend on
parts/             the scores of a block of rows each
scores.parquet     id, score, captions, labels, kept; in the corpus's order
report/            the page, with media of the clips that it shows
kept.txt           an id a line
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.arrow_writer import ParquetWriter

from dali_llava.eval.results import write_text
from dali_llava.train.data.corpus import KEPT

from .page import check_report, write_report


FEATURES = Features(
    {
        "id": Value("string"),
        "score": Value("float64"),
        "captions": List(Value("string")),
        "labels": List(Value("string")),
    }
)
REPORT = "report"


class ScoreFolder:
    """The scores of a folder, to which more are added a block at a time.

    Args:
        folder: made where it is not there.
        settings: what the scores depend on, as JSON has it.

    Raises:
        ValueError: when the folder's scores were made with other settings, each named; or a file is not what it
            should be, or would be lost to the report.
        OSError: when it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping):
        self.folder = Path(folder)
        self.parts, self.report = self.folder / "parts", self.folder / REPORT
        check_report(self.report)  # before the scores, which may take days
        self._check(json.loads(json.dumps(settings)))
        self.parts.mkdir(parents=True, exist_ok=True)
        paths = sorted(self.parts.glob("part-*.parquet"))
        self.next_part = int(paths[-1].stem.removeprefix("part-")) + 1 if paths else 0
        self.scores = {row["id"]: row for row in _read_parts(paths)}

    def _check(self, settings: dict) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            write_text(path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            there = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: not the settings of a pre-filter; name another output_dir") from error
        differences = [
            f"{name} {there.get(name)!r} there, {settings.get(name)!r} now"
            for name in dict.fromkeys([*there, *settings])
            if there.get(name) != settings.get(name)
        ]
        if differences:
            raise ValueError(f"{self.folder} holds other scores: {'; '.join(differences)}; name another output_dir.")

    def append(self, scored: Sequence[Mapping]) -> None:
        """Write {id, score, captions, labels} of a block as a part, whole or not at all."""
        if scored:
            _write_parquet(scored, FEATURES, self.parts / f"part-{self.next_part:06d}.parquet")
            self.next_part += 1
            self.scores.update((row["id"], dict(row)) for row in scored)

    def finish(self, rows: Dataset, kept: np.ndarray, left_out: Mapping[str, str], choice: str) -> None:
        """Write the lists and the report.

        Args:
            rows: the n scored ones, whole: the report opens the media of some.
            kept: (n,) bool.
            left_out: id -> reason of those without a score.
            choice: how they were chosen, in words.
        """
        scored = [{**self.scores[name], "kept": bool(keep)} for name, keep in zip(rows["id"], kept, strict=True)]
        _write_parquet(scored, Features({**FEATURES, "kept": Value("bool")}), self.folder / "scores.parquet")
        write_report(self.report, rows, scored, left_out, choice)
        # Last: what selects the rows stands for a finished run.
        write_text(self.folder / KEPT, "".join(f"{row['id']}\n" for row in scored if row["kept"]))


def _read_parts(paths: Sequence[Path]) -> list[dict]:
    """The rows of Parquet files, read without a copy in a cache; ValueError for a file that is no part."""
    if not paths:
        return []
    files = {"parts": [str(path) for path in paths]}
    try:
        return list(load_dataset("parquet", data_files=files, split="parts", features=FEATURES, streaming=True))
    except (ValueError, OSError) as error:
        if len(paths) > 1:
            return [row for path in paths for row in _read_parts([path])]  # to find the culprit
        raise ValueError(f"{paths[0]}: not a part of scores; delete it, and its clips are scored anew.") from error


def _write_parquet(rows: Iterable[Mapping], features: Features, path: Path) -> None:
    """Write rows under a temporary name and rename the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with ParquetWriter(path=str(temporary), features=features) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
