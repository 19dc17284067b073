"""Files of captions: CSV with a header, or JSON lines."""

import csv
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dali_llava.processing.corpora.names import is_utf8, name_key


logger = logging.getLogger(__name__)

# The id columns of this package, Clotho and AudioCaps. An AudioCaps id also contains the start time.
ID_COLUMNS = ("id", "file_name", "youtube_id")
START_COLUMN = "start_time"
_CAPTION_COLUMN = re.compile(r"caption(_\d+)?")


def read_candidates(path: str | os.PathLike, id_column: str | None = None) -> dict[str, str]:
    """Reads one caption per clip from CSV with ``id,caption``, or JSON lines ``{"id": ..., "caption": ...}``.

    Args:
        path: the file.
        id_column: see :func:`read_references`.

    Returns:
        Clip id -> caption, which may be blank.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an entry has the wrong format, or an id is repeated. The message names file, line and field.
    """
    candidates: dict[str, str] = {}
    for line, clip, captions in _entries(Path(path), id_column):
        if len(captions) != 1:
            raise ValueError(f"{path}, line {line}: {len(captions)} captions; a candidates file has one per clip")
        if clip in candidates:
            raise ValueError(f"{path}, line {line}: id {clip!r} appears twice; remove one")
        candidates[clip] = captions[0]
    return candidates


def read_references(path: str | os.PathLike, id_column: str | None = None) -> dict[str, list[str]]:
    """Reads all reference captions of each clip.

    A CSV file has the columns ``id,caption_1,...,caption_n`` or, as in Clotho, ``file_name,caption_1,...``, with blank
    cells skipped, or it has one row per caption with repeated ids. JSON lines have the form ``{"id": ..., "captions":
    [...]}``, or ``"caption"`` with repeated ids. For AudioCaps' ``audiocap_id,youtube_id,start_time,caption``, the id
    is ``YOUTUBEID_START``, as in the corpus. Ids are compared without media suffix: ``Rain.wav`` is ``Rain``. Torn
    rows, with too few or too many cells or without an id, are skipped with a warning that names the line.

    Args:
        path: the file.
        id_column: column or field of the ids; one of the above by default.

    Returns:
        Clip id -> captions, in the order of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an entry has the wrong format. The message names file, line and field.
    """
    references: dict[str, list[str]] = {}
    for line, clip, captions in _entries(Path(path), id_column):
        captions = [caption for caption in captions if caption.strip()]
        if not captions:
            raise ValueError(f"{path}, line {line}: id {clip!r} has only blank captions; fill in or remove the row")
        references.setdefault(clip, []).extend(captions)
    return references


def _entries(path: Path, id_column: str | None) -> Iterator[tuple[int, str, list[str]]]:
    """Yields line number, clip id and captions of each entry."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a CSV or JSON-lines file of captions")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; give it one caption per clip")
    read = _json_entries if text.lstrip().startswith("{") else _csv_entries
    empty = True
    for line, clip, captions in read(path, text, id_column):
        if not clip.strip():
            raise ValueError(f"{path}, line {line}: the id is blank; give the id of the clip")
        if not all(map(is_utf8, (clip, *captions))):
            raise ValueError(
                f"{path}, line {line}: a string contains a lone surrogate (half of a character such as an emoji); "
                "complete it, or remove the row"
            )
        yield line, name_key(clip), captions
        empty = False
    if empty:
        raise ValueError(f"{path}: the file has a header but no captions; add one row per clip")


def _csv_entries(path: Path, text: str, id_column: str | None) -> Iterator[tuple[int, str, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(row for row in reader if row)]
        names = (id_column,) if id_column else ID_COLUMNS
        name = next((name for name in names if name in header), None)
        if name is None:
            found = f"no column {', '.join(names)}, but {', '.join(header)}"
            raise ValueError(f"{path}, line 1: {found}; rename the column of the clips to id, or pass --id-column")
        twice = next((name for number, name in enumerate(header) if name in header[:number]), None)
        if twice is not None:
            raise ValueError(f"{path}, line 1: the column {twice!r} appears twice; rename one of them")
        start_column = (
            header.index(START_COLUMN) if name == "youtube_id" != id_column and START_COLUMN in header else None
        )
        caption_columns = [index for index, name in enumerate(header) if _CAPTION_COLUMN.fullmatch(name)]
        if not caption_columns:
            raise ValueError(f"{path}, line 1: no column caption or caption_1; rename the column of the captions")
        first_torn, has_rows = None, False
        for row in reader:
            if not row:
                continue
            place = f"{path}, line {reader.line_num}"
            torn = f"{len(row)} cells instead of {len(header)}" if len(row) != len(header) else None
            if torn is None and start_column is not None and not (row[header.index(name)] + row[start_column]).strip():
                torn = f"{name} and {START_COLUMN} are empty"
            if torn is not None:
                remedy = "put captions with commas or line breaks in double quotes"
                first_torn = first_torn or f"{place}: {torn}; {remedy}"
                logger.warning("%s: skipped a torn row (%s); %s", place, torn, remedy)
                continue
            has_rows = True
            clip = row[header.index(name)].strip()
            if start_column is not None:
                clip = f"{clip}_{_seconds(row[start_column], place):g}"
            yield reader.line_num, clip, [row[index] for index in caption_columns]
        if first_torn and not has_rows:
            raise ValueError(first_torn)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; check the double quotes there") from error


def _seconds(text: str, place: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{place}: {START_COLUMN} {text!r} is not a number of seconds; correct it")
    return seconds


def _json_entries(path: Path, text: str, id_column: str | None) -> Iterator[tuple[int, str, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); write one object per line") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{path}, line {number}: not an object; write {{"id": ..., "caption": ...}}')
        clip = next((entry[name] for name in ((id_column,) if id_column else ID_COLUMNS) if name in entry), None)
        if not isinstance(clip, str | int) or isinstance(clip, bool):
            raise ValueError(
                f"{path}, line {number}: field {id_column or 'id'} is missing or not a string; give the id of the clip"
            )
        captions = entry.get("captions", [entry["caption"]] if "caption" in entry else None)
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(
                f"{path}, line {number}: no field caption with a string or captions with a list of strings; add one"
            )
        yield number, str(clip), captions
