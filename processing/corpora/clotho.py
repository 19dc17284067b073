"""Clotho: recordings from Freesound with five captions each, with the media on disk."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from .listing import ListedCorpus, read_csv, split_file, walk_media
from .names import name_key
from .options import option


CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))


@dataclass
class Clotho(ListedCorpus):
    """
    Clotho: one row per recording of 15 to 30 seconds, with five captions.

    `dali_llava.processing.corpora` describes the columns; `id` is the file name without `.wav`, `frames` and `labels`
    are empty, and `end` is None because the clip is the whole file.

    Args:
        data_dir: the folder of the recordings.
        csv: the folder of `clotho_captions_development.csv`, `clotho_captions_validation.csv` and
            `clotho_captions_evaluation.csv`, or one of these files; `data_dir` by default.
        splits: the splits to load.
        missing: clips without a recording are skipped ("skip"), have no `audio` ("keep"), or raise an error ("error").
    """

    name = "clotho"
    splits: Sequence[str] = ("development", "validation", "evaluation")
    csv: str | None = option(
        "CSV file of the captions, or the folder with the CSV files of all splits; default: --data-dir",
        metavar="PATH",
        is_path=True,
        example="clotho",
    )

    def find_recordings(self, split: str) -> dict[str, str]:
        """The recordings, `name_key` of the file name -> path. A folder named like the split takes precedence."""
        found: dict[str, tuple[bool, str]] = {}
        if self.data_dir is None:
            if self.missing != "keep":
                raise ValueError("clotho needs data_dir=, the folder of its recordings, or missing='keep'")
            return {}
        for path, kind in walk_media(self.data_dir):
            if kind == "sound":
                is_other = split not in os.path.dirname(path).split(os.sep)
                choice, key = (is_other, os.path.join(self.data_dir, path)), name_key(os.path.basename(path))
                found[key] = min(choice, found.get(key, choice))
        return {key: path for key, (_, path) in found.items()}

    def read_rows(self, split: str) -> list[dict]:
        """One row per recording, in the order of the CSV file."""
        path = split_file(self, f"clotho_captions_{split}.csv")
        found, rows, seen = self.find_recordings(split), [], {}
        for place, row in read_csv(path, ("file_name", *CAPTIONS)):
            name = row["file_name"]
            empty = next((column for column in ("file_name", *CAPTIONS) if not row[column].strip()), None)
            if empty is not None:
                raise ValueError(f"{place}: {empty} of {name!r} is empty; fill it in, or remove the line")
            if seen.setdefault(name_key(name), place) != place:
                raise ValueError(f"{place}: {name!r} is also in {seen[name_key(name)]}; remove one")
            rows.append(
                {
                    "id": name_key(name),
                    "audio": {"path": found[name_key(name)], "bytes": None} if name_key(name) in found else None,
                    "frames": [],
                    "captions": [row[column].strip() for column in CAPTIONS],
                    "labels": [],
                    "start": 0.0,
                    "end": None,
                    "source": "clotho",
                }
            )
        return rows
