"""AudioCaps 1.0 and 2.0: captions of AudioSet clips, with the media on disk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .listing import ListedCorpus, clip_media, find_media, media_columns, read_csv, split_file
from .options import option


COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
DURATION = 10.0  # seconds; the CSV files contain only the start of a clip


@dataclass
class AudioCaps(ListedCorpus):
    """
    AudioCaps: one row per clip, with all its captions, including duplicates: one in `train`, five in `val` and `test`.

    `dali_llava.processing.corpora` describes the columns; `id` is `YOUTUBEID_START` and `labels` is empty.

    Args:
        data_dir: the folder of the media.
        csv: the folder of `train.csv`, `val.csv` and `test.csv`, or one of these files; `data_dir` by default.
        splits: the splits to load.
        whole_videos: whether a file named only by the YouTube id contains the whole video. By default, it contains
            the clip.
        missing: clips without media are skipped ("skip"), have no `audio` ("keep"), or raise an error ("error").
    """

    name = "audiocaps"
    splits: Sequence[str] = ("train", "val", "test")
    csv: str | None = option(
        "CSV file of the clips, or the folder with the CSV files of all splits; default: --data-dir",
        metavar="PATH",
        is_path=True,
        example="audiocaps/dataset",
    )
    whole_videos: bool = option(
        "treat files named only by the YouTube id as whole videos and cut the clips from them", default=False
    )

    def read_rows(self, split: str) -> list[dict]:
        """One row per clip, in the order of their first captions."""
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
                raise ValueError(f"{place}: {empty} is empty; fill it in, or remove the line")
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
                    # Some videos end within ten seconds of the start, so a file that is the clip sets its own end.
                    "end": None if alone else start + DURATION,
                    "source": "audiocaps",
                }
            )
        return rows
