"""AudioSet: clips of YouTube videos with labels, with the media on disk."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .listing import ListedCorpus, clip_media, find_media, media_columns, read_label_names, split_file
from .options import option


COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
LABELS_FILE = "class_labels_indices.csv"


def read_segments(path: str) -> Iterator[tuple[str, str, float, float, list[str]]]:
    """The segments of a CSV file: place ("FILE, line N"), YouTube id, start and end in seconds, label mids."""
    seen = {}
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file, skipinitialspace=True)
        for cells in reader:
            if not cells or cells[0].startswith("#"):
                continue
            place = f"{path}, line {reader.line_num}"
            if len(cells) != len(COLUMNS):
                wanted = f"expected the columns {', '.join(COLUMNS)}; found {', '.join(cells)}"
                raise ValueError(f"{place}: {wanted}; give the file as published")
            youtube_id, *times, mids = (cell.strip() for cell in cells)
            try:
                start, end = map(float, times)
            except ValueError as error:
                raise ValueError(f"{place}: start and end {times} are not numbers; correct them") from error
            if not 0 <= start < end < float("inf"):
                raise ValueError(
                    f"{place}: {youtube_id!r} starts at {start:g} s and ends at {end:g} s; give 0 <= start < end"
                )
            if seen.setdefault(youtube_id, place) != place:
                raise ValueError(f"{place}: {youtube_id!r} is also in {seen[youtube_id]}; remove one")
            yield place, youtube_id, start, end, [mid for mid in mids.split(",") if mid]


@dataclass
class AudioSet(ListedCorpus):
    """
    AudioSet: one row per segment.

    `dali_llava.processing.corpora` describes the columns; `id` is the YouTube id, `labels` are display names in the
    order of the CSV, and `captions` is empty.

    Args:
        data_dir: the folder of the media.
        csv: the folder of `balanced_train_segments.csv`, `unbalanced_train_segments.csv` and `eval_segments.csv`, or
            one of these files; `data_dir` by default.
        labels_csv: the file `class_labels_indices.csv`; by default, the one in the folder of the segments.
        splits: the splits to load.
        whole_videos: whether a file named only by the YouTube id contains the whole video. By default, it contains
            the clip.
        missing: clips without media are skipped ("skip"), have no `audio` ("keep"), or raise an error ("error").
    """

    name = "audioset"
    splits: Sequence[str] = ("balanced_train", "unbalanced_train", "eval")
    csv: str | None = option(
        "CSV file of the segments, or the folder with the CSV files of all splits; default: --data-dir",
        metavar="PATH",
        is_path=True,
        example="audioset/csv",
    )
    labels_csv: str | None = option(
        f"{LABELS_FILE}, with the names of the labels; default: in the folder of the segments",
        metavar="FILE",
        is_path=True,
    )
    whole_videos: bool = option(
        "treat files named only by the YouTube id as whole videos and cut the clips from them", default=False
    )

    def read_rows(self, split: str) -> list[dict]:
        """One row per segment, in the order of the CSV file."""
        path = split_file(self, f"{split}_segments.csv")
        labels_path = self.labels_csv or os.path.join(os.path.dirname(path), LABELS_FILE)
        if not os.path.isfile(labels_path):
            raise FileNotFoundError(f"{labels_path}: no such file; pass labels_csv=, AudioSet's {LABELS_FILE}")
        names, found, rows = read_label_names(labels_path), find_media(self), []
        for place, youtube_id, start, end, mids in read_segments(path):
            unknown = next((mid for mid in mids if mid not in names), None)
            if unknown is not None:
                raise ValueError(
                    f"{place}: label {unknown!r} is not in {labels_path}; use the index of the same release"
                )
            files, alone = clip_media(found, youtube_id, start, end, self.whole_videos)
            rows.append(
                {
                    "id": youtube_id,
                    **media_columns(files),
                    "captions": [],
                    "labels": [names[mid] for mid in mids],
                    "start": 0.0 if alone else start,
                    "end": end - start if alone else end,
                    "source": "audioset",
                }
            )
        return rows
