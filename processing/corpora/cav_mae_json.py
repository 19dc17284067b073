"""The JSON lists of CAV-MAE: sounds, each with the first frame of each of its seconds, and labels."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .listing import ListedCorpus, read_label_names
from .options import option


KEYS = ("video_id", "wav", "video_path", "labels")
NUM_FRAMES = 10


def read_list(path: str) -> list[dict[str, str]]:
    """The entries of a JSON list, each with all `KEYS`."""
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
        raise ValueError(f'{path}: expected {{"data": [...]}}; give a list in the form of CAV-MAE')
    seen = {}
    for number, entry in enumerate(entries):
        place = f"{path}, entry {number} of data"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in KEYS):
            found = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
            raise ValueError(f"{place}: expected texts under {', '.join(KEYS)}; found {found}; complete it")
        if seen.setdefault(entry["video_id"], number) != number:
            first = seen[entry["video_id"]]
            raise ValueError(f"{place}: video_id {entry['video_id']!r} is also in entry {first}; remove one")
    return entries


def file_finder(root: str, data_dir: str | None) -> Callable[..., str | None]:
    """
    A function from a folder of the list and a file in it to the file's path, None where it is not there.

    Lists hold paths of the machine they were made on. Where such a folder is not here, its last parts are looked for
    in `data_dir`, the longest run of them first, and after all `data_dir` itself. Each folder is read once.
    """

    @functools.cache
    def listing(folder: str, *inner: str) -> tuple[str, frozenset[str]]:
        parts = os.path.normpath(folder).strip(os.sep).split(os.sep)
        tails = [] if data_dir is None else [os.path.join(data_dir, *parts[first:]) for first in range(len(parts) + 1)]
        for place in [os.path.join(root, folder), *tails]:
            place = os.path.join(place, *inner)
            if os.path.isdir(place):
                return place, frozenset(os.listdir(place))
        return folder, frozenset()

    def find(*parts: str) -> str | None:
        place, names = listing(*parts[:-1])
        return os.path.join(place, parts[-1]) if parts[-1] in names else None

    return find


@dataclass
class CAVMAE(ListedCorpus):
    """
    The clips of a JSON list of CAV-MAE: `{"data": [{"video_id", "wav", "video_path", "labels"}, ...]}`.

    Columns are described in `dali_llava.processing.corpora`; `frames` are the files `video_path/frame_0/VIDEO_ID.jpg`
    to `frame_9` that exist, `captions` is empty, `end` is null: the clip is the whole file.

    Args:
        json: the list; relative paths in it start from its folder.
        data_dir: the folder in which to look for files that are not where the list says.
        labels_csv: AudioSet's `class_labels_indices.csv`, to turn labels into names; without it they stay as they are.
        splits: "train": a list is one split.
        missing: clips without sound are left out ("skip"), have no `audio` ("keep"), or are an error ("error").
    """

    name = "cav_mae_json"
    splits: Sequence[str] = ("train",)
    json: str | None = option(
        "the list of the clips", metavar="FILE", is_path=True, required=True, example="train.json"
    )
    labels_csv: str | None = option(
        "AudioSet's class_labels_indices.csv, to turn labels into names", metavar="FILE", is_path=True
    )

    def read_rows(self, split: str) -> list[dict]:
        """A row for each entry, in the order of the list."""
        if self.json is None:
            raise ValueError("cav_mae_json needs json=, the list of the clips")
        names = None if self.labels_csv is None else read_label_names(self.labels_csv)
        find, rows = file_finder(os.path.dirname(self.json), self.data_dir), []
        for number, entry in enumerate(read_list(self.json)):
            video_id, labels = entry["video_id"], [label for label in entry["labels"].split(",") if label]
            unknown = None if names is None else next((label for label in labels if label not in names), None)
            if unknown is not None:
                trouble = f"label {unknown!r} is not in {self.labels_csv}; take the index of its release"
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
