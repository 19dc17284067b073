"""Base class and helpers of listed corpora: a file that lists the clips, and a folder of their media."""

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .names import is_utf8, media_kind, name_key, printable
from .options import option, options_of


logger = logging.getLogger(__name__)


@dataclass
class ListedCorpus:
    """
    A corpus described by a list of clips, with the media on disk.

    A subclass is a dataclass that declares its options with `option`, sets `name` and `splits` (all splits), and
    implements `read_rows`. An instance holds the options for one call of `load_corpus`.

    Args:
        data_dir: the folder of the media.
        splits: the splits to load.
        missing: clips without media are skipped ("skip"), have no `audio` ("keep"), or raise an error ("error").

    Raises:
        ValueError: a split or choice is unknown, or `data_dir` is a file.
        FileNotFoundError: a path does not exist.
    """

    name: ClassVar[str]

    data_dir: str | None = option("folder of the media, searched at any depth", metavar="DIR", is_path=True)
    splits: Sequence[str] = ()
    missing: str = option(
        "skip or keep clips without media, or stop with an error",
        default="skip",
        choices=("skip", "keep", "error"),
    )

    def __post_init__(self):
        self.splits = (self.splits,) if isinstance(self.splits, str) else tuple(self.splits)
        for split in self.splits:
            if split not in type(self).splits:
                raise ValueError(f"{self.name} has no split {split!r}; known: {', '.join(type(self).splits)}")
        for declared in options_of(type(self)):
            value, choices = getattr(self, declared.name), declared.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{self.name}: {declared.name} must be one of {', '.join(choices)}, not {value!r}")
            if declared.metadata["is_path"] and value is not None:
                path = os.path.abspath(os.path.expanduser(value))
                if not os.path.exists(path):
                    raise FileNotFoundError(f"{path}: no such file or folder; check {declared.name}= of {self.name}")
                setattr(self, declared.name, path)
        if self.data_dir is not None and not os.path.isdir(self.data_dir):
            raise ValueError(f"{self.data_dir}: is a file; set data_dir= of {self.name} to the folder of the media")
        table = getattr(self, "csv", None)
        if table and os.path.isfile(table) and len(self.splits) > 1:
            raise ValueError(
                f"{table}: one file contains one split; select the split, or give the folder of all CSV files"
            )

    def read_rows(self, split: str) -> list[dict]:
        """The rows of a split, with or without media. `dali_llava.processing.corpora` describes the columns."""
        raise NotImplementedError

    def select_rows(self, split: str) -> list[dict]:
        """The rows with media, or all rows if `missing` is "keep". Logs the number of clips with media."""
        rows, corpus = self.read_rows(split), f"{self.name} {split}"
        lacking = [row["id"] for row in rows if row["audio"] is None]
        if not rows:
            raise ValueError(f"{corpus}: contains no clips; check the file that lists them, or data_dir=")
        if lacking and self.missing == "error":
            first = f"{len(lacking)} of {len(rows)} clips have no media in {self.data_dir}, first {lacking[0]!r}"
            raise FileNotFoundError(f"{corpus}: {first}; add the files, or pass missing='skip'")
        level = logging.WARNING if lacking else logging.INFO
        logger.log(level, "%s: %d of %d clips have media", corpus, len(rows) - len(lacking), len(rows))
        if self.missing == "keep":
            return rows
        if len(lacking) == len(rows):
            looked = f"none of {len(rows)} clips has media in {self.data_dir}; the first is {lacking[0]!r}"
            raise FileNotFoundError(f"{corpus}: {looked}; check data_dir= and its file names, or pass missing='keep'")
        return [row for row in rows if row["audio"] is not None]


def split_file(corpus: ListedCorpus, name: str) -> str:
    """The CSV file of a split: `csv` if it is a file, else the file `name` in the folder `csv` or `data_dir`."""
    place = corpus.csv or corpus.data_dir
    if place is None:
        raise ValueError(f"{corpus.name} needs csv=, the file {name} or its folder, and data_dir=, the media folder")
    path = place if os.path.isfile(place) else os.path.join(place, name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; pass csv=, the file {name} or its folder")
    return path


def read_csv(path: str, columns: Sequence[str], filled: Sequence[str] = ()) -> list[tuple[str, dict[str, str]]]:
    """
    The rows of a CSV file, each preceded by its place ("FILE, line N").

    Torn rows are skipped with a warning that names the line. A row is torn if it has too few or too many cells, or if
    all its cells in the columns `filled` are empty.

    Raises:
        ValueError: the file is not CSV in UTF-8, one of `columns` is missing, a column appears twice, or all rows are
            torn.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is not a CSV file in UTF-8 ({error}); give the file as published") from error
    if not set(columns) <= set(header):
        wanted = f"expected the columns {', '.join(columns)}; found {', '.join(header) or 'none'}"
        raise ValueError(f"{path}, line 1: {wanted}; give the file as published")
    twice = next((name for number, name in enumerate(header) if name in header[:number]), None)
    if twice is not None:
        raise ValueError(f"{path}, line 1: the column {twice!r} appears twice; rename one of them")
    rows = []
    for number, cells in lines:
        place = f"{path}, line {number}"
        row = dict(zip(header, cells, strict=False))
        if len(cells) != len(header):
            torn = f"{len(cells)} cells instead of {len(header)}"
        elif filled and not any(row[column].strip() for column in filled):
            torn = f"{' and '.join(filled)} are empty"
        else:
            rows.append((place, row))
            continue
        logger.warning("%s: skipped a torn row (%s); quote cells with commas or line breaks", place, torn)
    if lines and not rows:
        place = f"{path}, line {lines[0][0]}"
        raise ValueError(f"{place}: does not have {len(header)} cells; quote cells with commas, or correct the line")
    return rows


def read_label_names(path: str) -> dict[str, str]:
    """The label names of AudioSet, mid -> display name."""
    return {row["mid"]: row["display_name"] for _, row in read_csv(path, ("index", "mid", "display_name"))}


def walk_media(folder: str) -> Iterator[tuple[str, str]]:
    """Yield (relative path, kind) of each media file in a folder at any depth, sorted by path.

    Hidden files are skipped. Files with names that are not UTF-8 are skipped with a warning.
    """
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            kind = media_kind(name)
            if kind is None or name.startswith("."):
                continue
            path = os.path.join(parent, name)
            if is_utf8(path):
                found.append((os.path.relpath(path, folder), kind))
            else:
                logger.warning("%s: skipped, the file name is not UTF-8; rename the file", printable(path))
    yield from sorted(found)


def find_media(corpus: ListedCorpus) -> dict[str, dict[str, str]]:
    """The media in `data_dir` at any depth, `name_key` of the file name -> kind -> path, the first of several."""
    found: dict[str, dict[str, str]] = {}
    if corpus.data_dir is None:
        if corpus.missing != "keep":
            raise ValueError(f"{corpus.name} needs data_dir=, the folder of its media, or missing='keep'")
        return found
    for path, kind in walk_media(corpus.data_dir):
        found.setdefault(name_key(os.path.basename(path)), {}).setdefault(kind, os.path.join(corpus.data_dir, path))
    return found


def clip_media(
    found: dict[str, dict[str, str]], youtube_id: str, start: float, end: float, whole_videos: bool
) -> tuple[dict[str, str], bool]:
    """The files of a clip by kind, under any of the common names, and whether they contain only the clip."""
    starts = (f"{start:g}", f"{start:.1f}", f"{start:.3f}", f"{start:06g}", f"{1000 * start:.0f}_{1000 * end:.0f}")
    bare = [youtube_id, f"Y{youtube_id}"]
    alone = [f"{name}_{suffix}" for name in bare for suffix in starts]
    for names, is_alone in [(alone, True), (bare, False)] if whole_videos else [(alone + bare, True)]:
        files = {}
        for name in names:
            files = found.get(name_key(name), {}) | files
        if "sound" in files or "video" in files:
            return files, is_alone
    return {}, False


def media_columns(files: dict[str, str]) -> dict:
    """`audio` and `frames` of a row. A sound file takes precedence over a video, and a video over a picture."""
    sounds, pictures = (
        [{"path": files[kind], "bytes": None} for kind in kinds if kind in files]
        for kinds in (("sound", "video"), ("video", "image"))
    )
    return {"audio": sounds[0] if sounds else None, "frames": pictures[:1]}
