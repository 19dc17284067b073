"""AudioCaps 1.0 and 2.0: captions of AudioSet clips, beside the media on disk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .listing import ListedCorpus, clip_media, find_media, media_columns, read_csv, split_file
from .options import option


COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
DURATION = 10.0  # seconds; the CSVs tell only where a clip starts


@dataclass
class AudioCaps(ListedCorpus):
    """
    AudioCaps: a row per clip, with all its captions, duplicates too: one in `train`, five in `val` and `test`.

    Columns are described in `dali_llava.processing.corpora`; `id` is `YOUTUBEID_START`, `labels` is empty.

    Args:
        data_dir: the folder of the media.
        csv: the folder of `train.csv`, `val.csv`, `test.csv`, or one such file; the media's folder by default.
        splits: the splits to load.
        whole_videos: whether a file that is named by the YouTube id alone holds the whole video, or else the clip.
        missing: clips without media are left out ("skip"), have no `audio` ("keep"), or are an error ("error").
    """

    name = "audiocaps"
    splits: Sequence[str] = ("train", "val", "test")
    csv: str | None = option(
        "the list of the clips, or the folder of all lists; default: --data-dir",
        metavar="PATH",
        is_path=True,
        example="audiocaps/dataset",
    )
    whole_videos: bool = option("a file named by the YouTube id alone is the whole video, to be cut", default=False)

    def read_rows(self, split: str) -> list[dict]:
        """A row for each clip, in the order of its first caption."""
        path = split_file(self, f"{split}.csv")
        clips: dict[tuple[str, float], list[str]] = {}
        for place, row in read_csv(path, COLUMNS, filled=("youtube_id", "start_time")):
            try:
                start = float(row["start_time"])
            except ValueError:
                start = math.nan
            if not 0 <= start < math.inf:
                raise ValueError(f"{place}: start_time {row['start_time']!r} is not a number of seconds; correct it")
            caption = row["caption"].strip()
            if not caption or not row["youtube_id"].strip():
                empty = "youtube_id" if caption else "caption"
                raise ValueError(f"{place}: the {empty} is empty; fill it in, or remove the line")
            clips.setdefault((row["youtube_id"].strip(), start), []).append(caption)
        found, rows = find_media(self), []
        for (youtube_id, start), captions in clips.items():
            files, alone = clip_media(found, youtube_id, start, start + DURATION, self.whole_videos)
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
