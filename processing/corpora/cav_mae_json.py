"""JSON lists of CAV-MAE: sounds with labels and the first frame of each second."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .listing import ListedCorpus, read_label_names
from .names import is_utf8, media_kind, name_key
from .options import option


KEYS = ("video_id", "wav", "video_path", "labels")
NUM_FRAMES = 10


def read_list(path: str) -> list[dict[str, str]]:
    """The entries of a JSON list. Each has all `KEYS`."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}"
        raise ValueError(f"{place}: is not JSON ({error.msg}); give the list as published") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not JSON in UTF-8 ({error}); give the list as published") from error
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f'{path}: expected {{"data": [...]}}; give a list in the format of CAV-MAE')
    seen = {}
    for number, entry in enumerate(entries):
        place = f"{path}, entry {number} of data"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in KEYS):
            found = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
            raise ValueError(f"{place}: expected strings for {', '.join(KEYS)}; found {found}; complete the entry")
        if seen.setdefault(entry["video_id"], number) != number:
            first = seen[entry["video_id"]]
            raise ValueError(f"{place}: video_id {entry['video_id']!r} is also in entry {first}; remove one")
    return entries


def file_finder(root: str, data_dir: str | None) -> Callable[..., str | None]:
    """
    A function that maps a folder in the list and a file in it to the file's path, or to None if it does not exist.

    Lists contain paths from the machine that created them. If such a folder does not exist, its last parts are looked
    up in `data_dir`, the longest sequence first, and finally `data_dir` itself. Names match by their `name_key`. Each
    folder is read once.
    """

    @functools.cache
    def listing(folder: str, *inner: str) -> tuple[str, dict[tuple[str, str | None], str]]:
        parts = os.path.normpath(folder).strip(os.sep).split(os.sep)
        tails = [] if data_dir is None else [os.path.join(data_dir, *parts[first:]) for first in range(len(parts) + 1)]
        for place in [os.path.join(root, folder), *tails]:
            place = os.path.join(place, *inner)
            if os.path.isdir(place):
                names = [name for name in os.listdir(place) if is_utf8(name)]
                return place, {_key(name): name for name in sorted(names, reverse=True)}
        return folder, {}

    def find(*parts: str) -> str | None:
        place, names = listing(*parts[:-1])
        name = names.get(_key(parts[-1]))
        return None if name is None else os.path.join(place, name)

    return find


def _key(name: str) -> tuple[str, str | None]:
    return name_key(name), media_kind(name)


@dataclass
class CAVMAE(ListedCorpus):
    """
    The clips of a JSON list of CAV-MAE: `{"data": [{"video_id", "wav", "video_path", "labels"}, ...]}`.

    `dali_llava.processing.corpora` describes the columns; `frames` are the files `video_path/frame_0/VIDEO_ID.jpg` to
    `frame_9` that exist, `captions` is empty, and `end` is None because the clip is the whole file.

    Args:
        json: the list. Relative paths in it start from its folder.
        data_dir: the folder to search for files that do not exist at the path in the list.
        labels_csv: AudioSet's `class_labels_indices.csv`, to convert labels to names. By default, labels are not
            converted.
        splits: "train", because a list is one split.
        missing: clips without sound are skipped ("skip"), have no `audio` ("keep"), or raise an error ("error").
    """

    name = "cav_mae_json"
    splits: Sequence[str] = ("train",)
    json: str | None = option(
        "JSON list of the clips", metavar="FILE", is_path=True, required=True, example="train.json"
    )
    labels_csv: str | None = option(
        "AudioSet's class_labels_indices.csv, to convert labels to names", metavar="FILE", is_path=True
    )

    def read_rows(self, split: str) -> list[dict]:
        """One row per entry, in the order of the list."""
        if self.json is None:
            raise ValueError("cav_mae_json needs json=, the JSON list of the clips")
        names = None if self.labels_csv is None else read_label_names(self.labels_csv)
        find, rows = file_finder(os.path.dirname(self.json), self.data_dir), []
        for number, entry in enumerate(read_list(self.json)):
            video_id, labels = entry["video_id"], [label for label in entry["labels"].split(",") if label]
            unknown = None if names is None else next((label for label in labels if label not in names), None)
            if unknown is not None:
                trouble = f"label {unknown!r} is not in {self.labels_csv}; use the same release's index"
                raise ValueError(f"{self.json}, entry {number} of data: {trouble}")
            sound = find(*os.path.split(entry["wav"]))
            frames = [find(entry["video_path"], f"frame_{second}", f"{video_id}.jpg") for second in range(NUM_FRAMES)]
            rows.append(
                {
                    "id": video_id,
                    "audio": None if sound is None else {"path": sound, "bytes": None},
                    "frames": [{"path": path, "bytes": None} for path in frames if path is not None],
                    "captions": [],
                    "labels": labels if names is None else [names[label] for label in labels],
                    "start": 0.0,
                    "end": None,
                    "source": "cav_mae_json",
                }
            )
        return rows
