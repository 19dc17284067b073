"""
What the builders of listed corpora share: a list of clips, in a file of a known form, beside media in a folder.

`datasets` before 4 loads each builder as a script and copies this file beside it, but nothing that this file would
import of the package. It takes a comment behind the builder's `from .listing import ...` for the file's address.
"""

import csv
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets


logger = logging.getLogger(__name__)

NUM_SHARDS = 128  # units of work of num_proc, of nodes and of their workers

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": {"path": datasets.Value("string"), "bytes": datasets.Value("binary")},
        "frames": [{"path": datasets.Value("string"), "bytes": datasets.Value("binary")}],
        "captions": [datasets.Value("string")],
        "labels": [datasets.Value("string")],
        "start": datasets.Value("float64"),
        "end": datasets.Value("float64"),
        "source": datasets.Value("string"),
    }
)

KINDS = {
    **dict.fromkeys((".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"), "sound"),
    **dict.fromkeys((".mp4", ".mkv", ".webm", ".mov", ".avi"), "video"),
    **dict.fromkeys((".jpg", ".jpeg", ".png"), "image"),
}


def check_options(config: datasets.BuilderConfig, splits: Sequence[str], paths: Sequence[str]) -> None:
    """Reject unknown splits, choices of `missing` and paths that are not there; make the paths absolute."""
    config.splits = (config.splits,) if isinstance(config.splits, str) else tuple(config.splits)
    for split in config.splits:
        if split not in splits:
            raise ValueError(f"{config.name} has no split {split!r}; known: {', '.join(splits)}")
    if config.missing not in ("skip", "keep", "error"):
        raise ValueError(f"{config.name}: missing must be 'skip', 'keep' or 'error', not {config.missing!r}")
    for option in paths:
        path = getattr(config, option)
        if path is not None:
            path = os.path.abspath(os.path.expanduser(path))
            if not os.path.exists(path):
                raise FileNotFoundError(f"{path}: no such file or folder; check {option}= of {config.name}")
            setattr(config, option, path)
    if config.data_dir is not None and not os.path.isdir(config.data_dir):
        raise ValueError(f"{config.data_dir}: is a file; data_dir= of {config.name} is the folder of the media")
    if "csv" in paths and config.csv and os.path.isfile(config.csv) and len(config.splits) > 1:
        raise ValueError(f"{config.csv}: one file holds one split; name the split, or give the folder of all CSVs")


def split_file(config: datasets.BuilderConfig, name: str) -> str:
    """The CSV of a split: `csv` itself where it is a file, or `name` in that folder, by default the media's."""
    place = config.csv or config.data_dir
    if place is None:
        raise ValueError(f"{config.name} needs csv=, the file {name} or its folder, and data_dir=, that of its media")
    path = place if os.path.isfile(place) else os.path.join(place, name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; give csv=, the file {name} or its folder")
    return path


def read_csv(path: str, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file that has these columns, each behind the place that errors name."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found = list(reader.fieldnames or [])
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is no CSV file in UTF-8 ({error}); give the file as published") from error
    if not set(columns) <= set(found):
        wanted = f"expected the columns {', '.join(columns)}; found {', '.join(found) or 'none'}"
        raise ValueError(f"{path}, line 1: {wanted}; give the file as published")
    for place, row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{place}: does not have {len(found)} cells; quote cells with commas, or mend the line")
    return rows


def read_label_names(path: str) -> dict[str, str]:
    """mid -> display name."""
    return {row["mid"]: row["display_name"] for _, row in read_csv(path, ("index", "mid", "display_name"))}


def find_media(config: datasets.BuilderConfig) -> dict[str, dict[str, str]]:
    """The files of `data_dir`, at any depth: name without extension -> kind -> path, the first of several."""
    found = {}
    if config.data_dir is None:
        if config.missing != "keep":
            raise ValueError(f"{config.name} needs data_dir=, the folder of its media; missing='keep' does without")
        return found
    for parent, _, names in os.walk(config.data_dir, followlinks=True):
        for name in names:
            stem, extension = os.path.splitext(name)
            kind = KINDS.get(extension.lower())
            if kind is not None:
                path, files = os.path.join(parent, name), found.setdefault(stem, {})
                files[kind] = min(path, files.get(kind, path))
    return found


def clip_media(
    found: dict[str, dict[str, str]], youtube_id: str, start: float, end: float, cut: bool
) -> tuple[dict[str, str], bool]:
    """The files of a clip by kind, at any of the usual names, and whether they hold the clip alone."""
    starts = (f"{start:g}", f"{start:.1f}", f"{start:.3f}", f"{start:06g}", f"{1000 * start:.0f}_{1000 * end:.0f}")
    bare = [youtube_id, f"Y{youtube_id}"]
    alone = [f"{name}_{suffix}" for name in bare for suffix in starts]
    for names, is_alone in [(alone + bare, True)] if cut else [(alone, True), (bare, False)]:
        files = {}
        for name in names:
            files = found.get(name, {}) | files
        if "sound" in files or "video" in files:
            return files, is_alone
    return {}, False


def media_columns(files: dict[str, str]) -> dict:
    """`audio` and `frames` of a row: sound rather than a video's, and the video rather than a picture."""
    sounds, pictures = (
        [{"path": files[kind], "bytes": None} for kind in kinds if kind in files]
        for kinds in (("sound", "video"), ("video", "image"))
    )
    return {"audio": sounds[0] if sounds else None, "frames": pictures[:1]}


def select_rows(config: datasets.BuilderConfig, split: str, rows: list[dict]) -> list[dict]:
    """The rows that have media, or all where `missing` is "keep"; a line on the logger says how many have."""
    corpus = f"{config.name} {split}"
    lacking = [row["id"] for row in rows if row["audio"] is None]
    if not rows:
        raise ValueError(f"{corpus}: holds no clip; check the file that lists them, or data_dir=")
    if lacking and config.missing == "error":
        first = f"{len(lacking)} of {len(rows)} clips have no media in {config.data_dir}, first {lacking[0]!r}"
        raise FileNotFoundError(f"{corpus}: {first}; add the files, or pass missing='skip'")
    level = logging.WARNING if lacking else logging.INFO
    logger.log(level, "%s: %d of %d clips have media", corpus, len(rows) - len(lacking), len(rows))
    if config.missing == "keep":
        return rows
    if len(lacking) == len(rows):
        looked = f"none of {len(rows)} clips has media in {config.data_dir}; the first is {lacking[0]!r}"
        raise FileNotFoundError(f"{corpus}: {looked}; check data_dir= and its file names, or pass missing='keep'")
    return [row for row in rows if row["audio"] is not None]


def cache_key(config: datasets.BuilderConfig, features: datasets.Features | None) -> str:
    """A key of the rows, which hold all that the options, the lists and the media come to, and of the source:
    this file's and the builder's."""
    digest = hashlib.sha256(str(features or "").encode())
    for path in (__file__, inspect.getfile(type(config))):
        digest.update(Path(path).read_bytes())
    for split in config.splits:
        for row in config.rows[split]:
            digest.update(json.dumps([split, row]).encode())
    return f"{config.name}-{digest.hexdigest()[:16]}"


def shard(count: int) -> list[tuple[int, int]]:
    """(first, last + 1) of each of up to `NUM_SHARDS` shards of `count` rows, in order."""
    shards = min(NUM_SHARDS, count)
    return [(count * number // shards, count * (number + 1) // shards) for number in range(shards)]


@dataclass
class ListingConfig(datasets.BuilderConfig):
    """
    Options of every listed corpus.

    A subclass gives `name`, `splits` (by default all there are), `PATHS` and `read_rows`.

    Args:
        data_dir: the folder of the media.
        splits: those to make.
        missing: clips without media are left out ("skip"), have no `audio` ("keep"), or are an error ("error").

    Raises:
        ValueError: on an unknown split or choice.
        FileNotFoundError: on a path that is not there.
    """

    data_dir: str | None = None
    splits: Sequence[str] = ()
    missing: str = "skip"

    PATHS: ClassVar[Sequence[str]] = ("data_dir",)  # the options that are paths

    def __post_init__(self):
        super().__post_init__()
        check_options(self, type(self).splits, self.PATHS)

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Reads the rows, kept in `rows`, for the cache key depends on them."""
        self.rows = {split: select_rows(self, split, self.read_rows(split)) for split in self.splits}
        return cache_key(self, custom_features)

    def read_rows(self, split: str) -> list[dict]:
        """The rows of a split, with media or without."""
        raise NotImplementedError


class ListingBuilder(datasets.GeneratorBasedBuilder):
    """The rows of a `ListingConfig`. A subclass gives `BUILDER_CONFIG_CLASS` and `DESCRIPTION`."""

    VERSION = datasets.Version("1.0.0")
    DESCRIPTION = ""

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=self.DESCRIPTION, features=FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(split, gen_kwargs={"split": split, "ranges": shard(len(rows))})
            for split, rows in self.config.rows.items()
        ]

    def _generate_examples(self, split: str, ranges: list[tuple[int, int]]) -> Iterator[tuple[str, dict]]:
        for start, stop in ranges:
            for row in self.config.rows[split][start:stop]:
                yield row["id"], row
