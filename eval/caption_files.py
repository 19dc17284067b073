"""Files of captions: CSV with a header, or one JSON object a line."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path


# The columns that name a clip: ours, Clotho's and AudioCaps'.
ID_COLUMNS = ("id", "file_name", "youtube_id")
_CAPTION_COLUMN = re.compile(r"caption(_\d+)?")


def read_candidates(path: str | os.PathLike) -> dict[str, str]:
    """Reads one caption a clip: ``id,caption`` as CSV, or ``{"id": ..., "caption": ...}`` a line.

    Returns:
        Clip id -> caption, which may be blank.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file, line and field, for anything that is not such a caption, and for a repeated id.
    """
    candidates: dict[str, str] = {}
    for line, clip, captions in _entries(Path(path)):
        if len(captions) != 1:
            raise ValueError(f"{path}, line {line}: {len(captions)} captions; a candidates file has one a clip")
        if clip in candidates:
            raise ValueError(f"{path}, line {line}: id {clip!r} stands there twice; remove one")
        candidates[clip] = captions[0]
    return candidates


def read_references(path: str | os.PathLike) -> dict[str, list[str]]:
    """Reads the reference captions of each clip, all of them.

    CSV: ``id,caption_1,...,caption_n`` (Clotho's ``file_name,...`` too), blank cells left out, or a row a caption with
    the id repeated (AudioCaps' ``audiocap_id,youtube_id,start_time,caption``). JSON lines: ``{"id": ..., "captions":
    [...]}``, or ``"caption"`` with the id repeated.

    Returns:
        Clip id -> captions, in the file's order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file, line and field, for anything that is not such a caption.
    """
    references: dict[str, list[str]] = {}
    for line, clip, captions in _entries(Path(path)):
        captions = [caption for caption in captions if caption.strip()]
        if not captions:
            raise ValueError(f"{path}, line {line}: id {clip!r} has only blank captions; fill in or remove the row")
        references.setdefault(clip, []).extend(captions)
    return references


def _entries(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, clip id and captions of every entry."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name a CSV or JSON-lines file of captions")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; give it one caption a clip")
    entries = _json_entries(path, text) if text.lstrip().startswith("{") else _csv_entries(path, text)
    empty = True
    for line, clip, captions in entries:
        if not clip.strip():
            raise ValueError(f"{path}, line {line}: the id is blank; give the clip's")
        yield line, clip, captions
        empty = False
    if empty:
        raise ValueError(f"{path}: a header and no captions; give it one row a clip")


def _csv_entries(path: Path, text: str) -> Iterator[tuple[int, str, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(row for row in reader if row)]
        id_column = next((header.index(name) for name in ID_COLUMNS if name in header), None)
        if id_column is None:
            raise ValueError(f"{path}, line 1: no column {', '.join(ID_COLUMNS)}; name the clip's column id")
        caption_columns = [index for index, name in enumerate(header) if _CAPTION_COLUMN.fullmatch(name)]
        if not caption_columns:
            raise ValueError(f"{path}, line 1: no column caption or caption_1; name the caption's column so")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} cells where the header has {len(header)}; "
                    "put captions with commas in double quotes"
                )
            yield reader.line_num, row[id_column], [row[index] for index in caption_columns]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; check the double quotes there") from error


def _json_entries(path: Path, text: str) -> Iterator[tuple[int, str, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); write one object a line") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{path}, line {number}: not an object; write {{"id": ..., "caption": ...}}')
        clip = next((entry[name] for name in ID_COLUMNS if name in entry), None)
        if not isinstance(clip, str | int) or isinstance(clip, bool):
            raise ValueError(f"{path}, line {number}: field id is missing or not a string; give the clip's id")
        captions = entry.get("captions", [entry["caption"]] if "caption" in entry else None)
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(
                f"{path}, line {number}: no field caption with a string, nor captions with a list of strings; add one"
            )
        yield number, str(clip), captions
