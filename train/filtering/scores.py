"""Output folder of the pre-filter. Scores are saved in parts as they are computed, so that a run can be resumed.

settings.json      the settings that determine the scores
parts/             the scores, one file per block of rows
scores.parquet     id, score, captions, labels, kept; in the order of the corpus
report/            the HTML page and the media of the clips shown
kept.txt           the ids of the clips kept, one per line
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.arrow_writer import ParquetWriter

from dali_llava.atomic import atomic_path, write_text
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
    """The scores in a folder, extended block by block.

    Args:
        folder: output folder; created if missing.
        settings: JSON-serializable settings that determine the scores.

    Raises:
        ValueError: if the folder holds scores of other settings (each difference is named), if one of its files is
            invalid, or if the report would overwrite other files.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping):
        self.folder = Path(folder)
        self.parts, self.report = self.folder / "parts", self.folder / REPORT
        check_report(self.report)  # before scoring, which may take days
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
            raise ValueError(f"{path}: not the settings of a pre-filter; give another output_dir") from error
        differences = [
            f"{name} is {there.get(name)!r} there and {settings.get(name)!r} now"
            for name in dict.fromkeys([*there, *settings])
            if there.get(name) != settings.get(name)
        ]
        if differences:
            raise ValueError(f"{self.folder} has other settings: {'; '.join(differences)}; give another output_dir.")

    def append(self, scored: Sequence[Mapping]) -> None:
        """Write {id, score, captions, labels} of each clip of a block to a new part, atomically."""
        if scored:
            _write_parquet(scored, FEATURES, self.parts / f"part-{self.next_part:06d}.parquet")
            self.next_part += 1
            self.scores.update((row["id"], dict(row)) for row in scored)

    def finish(self, rows: Dataset, kept: np.ndarray, left_out: Mapping[str, str], choice: str) -> None:
        """Write the lists and the report.

        Args:
            rows: the n scored rows with their media, some of which are opened for the report.
            kept: (n,) bool.
            left_out: reasons of the clips without a score, by id.
            choice: description of the selection rule.
        """
        scored = [{**self.scores[name], "kept": bool(keep)} for name, keep in zip(rows["id"], kept, strict=True)]
        _write_parquet(scored, Features({**FEATURES, "kept": Value("bool")}), self.folder / "scores.parquet")
        write_report(self.report, rows, scored, left_out, choice)
        # Written last, because the presence of this list marks a finished run.
        write_text(self.folder / KEPT, "".join(f"{row['id']}\n" for row in scored if row["kept"]))


def _read_parts(paths: Sequence[Path]) -> list[dict]:
    """Read the rows of Parquet files without caching them. Raises a ValueError for a file that is not a valid part."""
    if not paths:
        return []
    files = {"parts": [str(path) for path in paths]}
    try:
        return list(load_dataset("parquet", data_files=files, split="parts", features=FEATURES, streaming=True))
    except (ValueError, OSError) as error:
        if len(paths) > 1:
            return [row for path in paths for row in _read_parts([path])]  # finds the invalid file
        raise ValueError(f"{paths[0]}: not a valid part of the scores; delete it to score its clips again.") from error


def _write_parquet(rows: Iterable[Mapping], features: Features, path: Path) -> None:
    """Write rows, whole or not at all."""
    with atomic_path(path) as temporary, ParquetWriter(path=str(temporary), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
