"""A folder of videos, or of sounds and pictures with the same name, with an optional table of captions and labels."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .listing import ListedCorpus, media_columns, read_csv, walk_media
from .names import is_utf8, name_key
from .options import option


TABLES = ("metadata.csv", "metadata.jsonl")


def read_jsonl(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each preceded by its place ("FILE, line N")."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ValueError(f"{place}: is not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, found {row!r}; write one object per line")
        if b"\\u" in line and not is_utf8(json.dumps(row, ensure_ascii=False)):
            raise ValueError(
                f"{place}: a string contains a lone surrogate (half of a character such as an emoji); "
                "complete it, or remove the line"
            )
        rows += [(place, row)] if row else []
    return rows


def read_table(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of `metadata.csv` or `metadata.jsonl`, each with its place. Each row has an `id` or a `file_name`."""
    rows = read_jsonl(path) if path.endswith(".jsonl") else read_csv(path, ())
    for place, row in rows:
        names = [row[column] for column in ("id", "file_name") if row.get(column)]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"{place}: expected a string for file_name or id; found {', '.join(row)}; add the name of the file"
            )
    return rows


def texts(place: str, column: str, value: Any) -> list[str]:
    """The strings in a cell: a list, a JSON list, or one string. Semicolons separate the labels of a string."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: {column} is not a JSON list ({error.msg}); correct it") from error
    if isinstance(value, str):
        value = [label for label in value.split(";") if label.strip()] if column == "labels" else [value]
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{place}: {column} is {value!r}, expected non-empty strings; fill it in, or remove it")
    return [text.strip() for text in value]


def captions_of(place: str, row: dict[str, Any]) -> list[str]:
    """The captions of a row, from the columns `captions`, `caption`, `caption_1`, ... Empty cells are skipped."""
    numbered = sorted(
        (column for column in row if column.startswith("caption_") and column[8:].isdigit()),
        key=lambda column: int(column[8:]),
    )
    columns = [column for column in ("captions", "caption", *numbered) if row.get(column) not in (None, "")]
    return [text for column in columns for text in texts(place, column, row[column])]


def segment_of(place: str, row: dict[str, Any]) -> tuple[float, float | None]:
    """Start and end of a row in seconds; 0 and None if the row does not have them."""
    given = [row.get("start"), row.get("end")]
    try:
        start, end = (None if value in (None, "") else float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: start and end {given} are not numbers of seconds; correct them") from error
    start = 0.0 if start is None else start
    if not 0 <= start < math.inf or (end is not None and not start < end < math.inf):
        raise ValueError(f"{place}: start is {start} s and end is {end} s; give 0 <= start < end")
    return start, end


def find_clips(folder: str) -> dict[str, dict[str, str]]:
    """
    The media in a folder at any depth, `name_key` of the relative path -> kind -> path. The first of several paths
    with the same key and kind is used.
    """
    found: dict[str, dict[str, str]] = {}
    for path, kind in walk_media(folder):
        found.setdefault(name_key(path), {}).setdefault(kind, os.path.join(folder, path))
    return dict(sorted(found.items()))


@dataclass
class Folder(ListedCorpus):
    """
    A folder of clips: one row per group of files with the same path and different suffixes.

    `dali_llava.processing.corpora` describes the columns; `id` is the path relative to the folder, or the `id` in the
    table. With a table, the rows are its lines, and clips that are not in the table are skipped. The table has these
    columns; only the first is required:

    - `file_name`, with or without suffix, or `id`. With both columns, one file can contain several clips.
    - `captions` (a list; in a CSV file, a JSON list), `caption`, `caption_1`, `caption_2`, ...
    - `labels` (a list; in a CSV file, a JSON list or labels separated by semicolons).
    - `start`, `end`: position of the clip in the file, in seconds.

    Args:
        data_dir: the folder.
        metadata: a table of the clips, CSV or JSON lines; default: `metadata.csv` or `metadata.jsonl` in `data_dir`.
        splits: "train", because a folder is one split.
        missing: clips without sound are skipped ("skip"), have no `audio` ("keep"), or raise an error ("error").
    """

    name = "folder"
    data_dir: str | None = option(
        "folder of the clips, searched at any depth", metavar="DIR", is_path=True, required=True, example="clips"
    )
    splits: Sequence[str] = ("train",)
    metadata: str | None = option(
        "table of the clips; default: metadata.csv or metadata.jsonl in the folder", metavar="FILE", is_path=True
    )

    def table(self) -> str | None:
        """The path of the table, or None."""
        tables = [os.path.join(self.data_dir, name) for name in TABLES]
        tables = [self.metadata] if self.metadata else [path for path in tables if os.path.isfile(path)]
        if len(tables) > 1:
            raise ValueError(f"{self.data_dir}: contains both {' and '.join(TABLES)}; remove one, or pass metadata=")
        return tables[0] if tables else None

    def read_rows(self, split: str) -> list[dict]:
        """One row per line of the table, in its order; without a table, one row per clip, sorted by name."""
        if self.data_dir is None:
            raise ValueError("folder needs data_dir=, the folder of the clips")
        found, table, rows, seen = find_clips(self.data_dir), self.table(), [], {}
        listed = [("", {"id": clip}) for clip in found] if table is None else read_table(table)
        for place, row in listed:
            stem = name_key(row.get("file_name") or row["id"])
            clip = (row.get("id") or stem).strip()
            if seen.setdefault(clip, place) != place:
                raise ValueError(f"{place}: {clip!r} is also in {seen[clip]}; remove one, or give each row an id")
            start, end = segment_of(place, row)
            rows.append(
                {
                    "id": clip,
                    **media_columns(found.get(stem, {})),
                    "captions": captions_of(place, row),
                    "labels": texts(place, "labels", row.get("labels") or []),
                    "start": start,
                    "end": end,
                    "source": "folder",
                }
            )
        return rows
