"""
Clotho: recordings of Freesound with five captions each, beside the media that the reader has.

The file imports nothing of its package but `listing`, so that `datasets` before 4 loads it as a script.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from .listing import ListingBuilder, ListingConfig, read_csv, split_file


SPLITS = ("development", "validation", "evaluation")
CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))


@dataclass
class ClothoConfig(ListingConfig):
    """
    Options of `Clotho`.

    Args:
        data_dir: the folder of the recordings.
        csv: the folder of `clotho_captions_development.csv`, `_validation.csv`, `_evaluation.csv`, or one such file;
            the recordings' folder by default.
        splits: those to make.
        missing: clips without recording are left out ("skip"), have no `audio` ("keep"), or are an error ("error").
    """

    name: str = "clotho"
    csv: str | None = None
    splits: Sequence[str] = SPLITS

    PATHS = ("data_dir", "csv")

    def find_recordings(self, split: str) -> dict[str, str]:
        """File name -> path; of files that share a name, the one in a folder named like the split."""
        found: dict[str, tuple[bool, str]] = {}
        if self.data_dir is None and self.missing != "keep":
            raise ValueError("clotho needs data_dir=, the folder of its recordings; missing='keep' does without")
        for parent, _, names in os.walk(self.data_dir, followlinks=True) if self.data_dir else ():
            is_other = split not in os.path.relpath(parent, self.data_dir).split(os.sep)
            for name in names:
                choice = (is_other, os.path.join(parent, name))
                found[name] = min(choice, found.get(name, choice))
        return {name: path for name, (_, path) in found.items()}

    def read_rows(self, split: str) -> list[dict]:
        """A row for each recording, in the order of the CSV."""
        path = split_file(self, f"clotho_captions_{split}.csv")
        found, rows, seen = self.find_recordings(split), [], {}
        for place, row in read_csv(path, ("file_name", *CAPTIONS)):
            name = row["file_name"]
            empty = next((column for column in ("file_name", *CAPTIONS) if not row[column].strip()), None)
            if empty is not None:
                raise ValueError(f"{place}: the {empty} of {name!r} is empty; fill it in, or remove the line")
            if seen.setdefault(name, place) != place:
                raise ValueError(f"{place}: {name!r} stands in {seen[name]} already; remove one")
            rows.append(
                {
                    "id": os.path.splitext(name)[0],
                    "audio": {"path": found[name], "bytes": None} if name in found else None,
                    "frames": [],
                    "captions": [row[column].strip() for column in CAPTIONS],
                    "labels": [],
                    "start": 0.0,
                    "end": None,
                    "source": "clotho",
                }
            )
        return rows


class Clotho(ListingBuilder):
    """
    A row a recording of 15 to 30 seconds, with five captions.

    Columns are described in `dali_llava.processing.corpora`; `id` is the file name without `.wav`, `frames` and
    `labels` are empty, `end` is null: the clip is the whole file.
    """

    BUILDER_CONFIG_CLASS = ClothoConfig
    DESCRIPTION = "Clotho"
