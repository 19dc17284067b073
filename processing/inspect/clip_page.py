"""A page of clips to hear and see: HTML that needs nothing but the media beside it, in a folder that comes whole."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dali_llava.processing.shards.clip import REQUIREMENTS, ClipSettings, Dropped, is_given, prepare_clip


PAGE, MEDIA = "index.html", "media"

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
th { text-align: left; font-weight: normal; padding-right: 2rem; vertical-align: top; white-space: nowrap; }
svg, p img { max-width: 100%; }
svg { height: auto; font-size: 13px; fill: currentColor; }
rect { fill: steelblue; }
article { border-top: 1px solid gray; margin-top: 2rem; }
article img { height: 9rem; margin: 0 .25rem .25rem 0; }
.broken { color: crimson; }
"""


@dataclass(frozen=True)
class ClipSample:
    """An opened clip: its row, its media by extension (flac, 0.jpg, 1.jpg, ...), what of it cannot be opened, and
    why."""

    row: Mapping[str, Any]
    files: dict[str, bytes]
    problems: list[Dropped]


def open_clip(row: Mapping[str, Any], frames: int = 10) -> ClipSample:
    """
    Sound and frames of a clip, decoded as `dali-llava prepare` does; each on its own, so that one may be broken.

    Args:
        row: of a corpus.
        frames: most frames, the first of each second; 1 to 1000.
    """
    files, problems = {}, []
    # an id may come from the name of a file, which need not be Unicode
    part = {**row, "id": row["id"].encode(errors="replace").decode(), "audio": None, "frames": []}
    given = {"audio": is_given(row["audio"]), "frames": bool(row["frames"])}
    for column in (column for column in REQUIREMENTS if given[column]):
        settings = ClipSettings(frames, min_seconds=0.1, keep_silent=True, keep_frozen=True, require=(column,))
        outcome = prepare_clip(part | {column: row[column]}, settings)
        if isinstance(outcome, Dropped):
            problems.append(outcome)
        else:
            files |= {name: content for name, content in outcome.files.items() if name != "json"}
    return ClipSample(row, files, problems)


def check_folder(out: Path, names: Set[str], option: str) -> None:
    """
    Find out before the work whether a page can be written to the folder `out`.

    Args:
        names: of all that a folder of such a page holds.
        option: by which the user named the folder; the messages ask for another.

    Raises:
        ValueError: it holds something else than such a page, which would be replaced.
        OSError: it cannot be written.
    """
    out = out.resolve()
    with _blaming(out, option):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent):
            held = {path.name for path in out.iterdir()} if out.exists() else set()
    if held and held != names:
        raise ValueError(f"{out}: holds other files, which would be lost; give {option} a new folder")


@contextmanager
def new_folder(out: Path, names: Set[str], option: str) -> Iterator[Path]:
    """
    An empty folder to fill, which takes the place of `out` when the block ends; an error within leaves `out` alone.

    Args:
        names, option: as `check_folder` takes them.

    Raises:
        OSError, ValueError: as `check_folder`.
    """
    check_folder(out, names, option)
    out = out.resolve()
    with _blaming(out, option), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch, "new")
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(Path(scratch, "old"))
        folder.rename(out)


@contextmanager
def _blaming(out: Path, option: str) -> Iterator[None]:
    """Errors of writing within become one line with the remedy."""
    try:
        yield
    except OSError as error:
        told = error.strerror or error
        raise OSError(f"{out}: cannot be written ({told}); give {option} a folder that you may write to") from error


def write_text(path: Path, text: str) -> None:
    """UTF-8; names of files may hold what is no Unicode, and get a question mark for it."""
    path.write_bytes(text.encode(errors="replace"))


def write_media(folder: Path, samples: Sequence[ClipSample]) -> None:
    """Write the samples' media into `folder`/media, by the names that `article` gives them."""
    (folder / MEDIA).mkdir()
    for number, sample in enumerate(samples):
        for extension, content in sample.files.items():
            (folder / _media_name(number, extension)).write_bytes(content)


def _media_name(number: int, extension: str) -> str:
    return f"{MEDIA}/{number:03d}.{extension}"


def to_page(title: str, *sections: str) -> str:
    """The whole page: a title in plain text over sections in HTML."""
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def to_table(lines: Sequence[tuple[str, str]]) -> str:
    """A name and a value a line, in plain text."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in lines)
    return "\n".join(["<table>", *rows, "</table>"])


def article(number: int, sample: ClipSample, captions: Sequence[str], *facts: str) -> str:
    """
    One clip: `facts`, where it is from, its labels, what of it cannot be opened, its media, and captions.

    Args:
        number: its place among the samples of `write_media`.
    """
    row = sample.row
    start = row["start"] or 0.0
    time = f"from {start:g} s" if row["end"] is None else span(start, row["end"])
    file = next((source["path"] for source in (row["audio"], *row["frames"]) if source and source["path"]), None)
    told = [*facts, row["source"], file, time, "labels: " + (", ".join(row["labels"]) or "none")]
    problems = [
        f'<p class="broken">cannot be opened, {escape(problem.reason)}: {escape(problem.detail)}</p>'
        for problem in sample.problems
    ]
    listed = "".join(f"<li>{escape(caption)}</li>" for caption in captions)
    return "\n".join(
        [
            f'<article class="sample">\n<h3>{escape(row["id"])}</h3>',
            f"<p>{'<br>'.join(escape(text) for text in told if text)}</p>",
            *problems,
            *([] if is_given(row["audio"]) else ["<p>no sound</p>"]),
            *(_element(_media_name(number, extension)) for extension in sample.files),
            f"<ul>{listed}</ul>" if listed else "<p>no captions</p>",
            "</article>",
        ]
    )


def _element(name: str) -> str:
    if name.endswith(".flac"):
        return f'<p><audio controls preload="none" src="{name}"></audio></p>'
    return f'<img src="{name}" alt="frame {name.split(".")[-2]}" loading="lazy">'


def span(start: float, end: float) -> str:
    """Seconds in words: "0.5 to 2 s", or "2 s" where both are the same."""
    return f"{start:g} s" if start == end else f"{start:g} to {end:g} s"
