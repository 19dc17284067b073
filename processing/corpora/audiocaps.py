"""
AudioCaps: captions of AudioSet clips, beside the media that the reader has. Both versions, whose CSVs have one form.

The file imports nothing of its package but `listing`, so that `datasets` before 4 loads it as a script.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .listing import ListingBuilder, ListingConfig, clip_media, find_media, media_columns, read_csv, split_file


SPLITS = ("train", "val", "test")
COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
DURATION = 10.0  # seconds; the CSVs tell only where a clip starts


@dataclass
class AudioCapsConfig(ListingConfig):
    """
    Options of `AudioCaps`.

    Args:
        data_dir: the folder of the media.
        csv: the folder of `train.csv`, `val.csv`, `test.csv`, or one such file; the media's folder by default.
        splits: those to make.
        cut: whether a file that is named by the YouTube id alone holds the clip alone, or else the whole video.
        missing: clips without media are left out ("skip"), have no `audio` ("keep"), or are an error ("error").
    """

    name: str = "audiocaps"
    csv: str | None = None
    splits: Sequence[str] = SPLITS
    cut: bool = True

    PATHS = ("data_dir", "csv")

    def read_rows(self, split: str) -> list[dict]:
        """A row for each clip, in the order of its first caption."""
        path = split_file(self, f"{split}.csv")
        clips: dict[tuple[str, float], list[str]] = {}
        for place, row in read_csv(path, COLUMNS):
            try:
                start = float(row["start_time"])
            except ValueError:
                start = math.nan
            if not 0 <= start < math.inf:
                raise ValueError(f"{place}: start_time {row['start_time']!r} is no number of at least 0; correct it")
            caption = row["caption"].strip()
            if not caption or not row["youtube_id"].strip():
                empty = "youtube_id" if caption else "caption"
                raise ValueError(f"{place}: the {empty} is empty; fill it in, or remove the line")
            clips.setdefault((row["youtube_id"].strip(), start), []).append(caption)
        found, rows = find_media(self), []
        for (youtube_id, start), captions in clips.items():
            files, alone = clip_media(found, youtube_id, start, start + DURATION, self.cut)
            rows.append(
                {
                    "id": f"{youtube_id}_{start:g}",
                    **media_columns(files),
                    "captions": captions,
                    "labels": [],
                    "start": 0.0 if alone else start,
                    # Not every video had ten seconds left: only the file knows where a clip of its own ends.
                    "end": None if alone else start + DURATION,
                    "source": "audiocaps",
                }
            )
        return rows


class AudioCaps(ListingBuilder):
    """
    A row a clip, with all its captions, duplicates too: one in `train`, five in `val` and `test`.

    Columns are described in `dali_llava.processing.corpora`; `id` is `YOUTUBEID_START`, `labels` is empty.
    """

    BUILDER_CONFIG_CLASS = AudioCapsConfig
    DESCRIPTION = "AudioCaps"
