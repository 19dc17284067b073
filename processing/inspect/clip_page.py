"""Write an HTML page of clips with sound and frames. The folder contains all media and is written atomically."""

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
    """
    An opened clip.

    Attributes:
        row: row of the clip.
        files: contents of its media by extension (flac, 0.jpg, 1.jpg, ...).
        problems: media that cannot be opened, with reasons.
    """

    row: Mapping[str, Any]
    files: dict[str, bytes]
    problems: list[Dropped]


def open_clip(row: Mapping[str, Any], frames: int = 10) -> ClipSample:
    """
    Open the sound and frames of a clip, decoded as in `dali-llava prepare`.

    The two are opened separately, so one of them may be broken.

    Args:
        row: row of a corpus.
        frames: maximum number of frames, 1 to 1000; the first frame of each second is taken.
    """
    files, problems = {}, []
    # an id may be the name of a file, which may not be Unicode
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
    Check that a page can be written to the folder `out`, before the work starts.

    Args:
        out: folder of the page.
        names: names of all files and folders of such a page.
        option: option that sets the folder, for error messages.

    Raises:
        ValueError: if the folder contains something other than such a page, which would be replaced.
        OSError: if the folder cannot be written.
    """
    out = out.resolve()
    with _blaming(out, option):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent):
            held = {path.name for path in out.iterdir()} if out.exists() else set()
    if held and held != names:
        raise ValueError(f"{out}: contains other files, which would be lost; give {option} a new folder")


@contextmanager
def new_folder(out: Path, names: Set[str], option: str) -> Iterator[Path]:
    """
    Yield an empty folder that replaces `out` when the block ends. After an error in the block, `out` is unchanged.

    Args:
        out, names, option: as in `check_folder`.

    Raises:
        OSError, ValueError: as in `check_folder`.
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
    """Convert write errors in the block to one line with the remedy."""
    try:
        yield
    except OSError as error:
        problem = error.strerror or error
        raise OSError(f"{out}: cannot be written ({problem}); give {option} a folder that you may write to") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8. Parts of file names that are not Unicode become question marks."""
    path.write_bytes(text.encode(errors="replace"))


def write_media(folder: Path, samples: Sequence[ClipSample]) -> None:
    """Write the media of the samples to `folder`/media, under the names that `article` uses."""
    (folder / MEDIA).mkdir()
    for number, sample in enumerate(samples):
        for extension, content in sample.files.items():
            (folder / _media_name(number, extension)).write_bytes(content)


def _media_name(number: int, extension: str) -> str:
    return f"{MEDIA}/{number:03d}.{extension}"


def to_page(title: str, *sections: str) -> str:
    """Return the page: a title in plain text and sections in HTML."""
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
    """Return an HTML table of names and values, which are plain text."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in lines)
    return "\n".join(["<table>", *rows, "</table>"])


def article(number: int, sample: ClipSample, captions: Sequence[str], *facts: str) -> str:
    """
    Return the HTML of one clip: facts, source, labels, media that cannot be opened, media, and captions.

    Args:
        number: index of the sample among the samples of `write_media`.
        sample: the clip.
        captions: captions to list.
        *facts: lines of text to show first.
    """
    row = sample.row
    start = row["start"] or 0.0
    time = f"from {start:g} s" if row["end"] is None else span(start, row["end"])
    file = next((source["path"] for source in (row["audio"], *row["frames"]) if source and source["path"]), None)
    lines = [*facts, row["source"], file, time, "labels: " + (", ".join(row["labels"]) or "none")]
    problems = [
        f'<p class="broken">cannot be opened, {escape(problem.reason)}: {escape(problem.detail)}</p>'
        for problem in sample.problems
    ]
    listed = "".join(f"<li>{escape(caption)}</li>" for caption in captions)
    return "\n".join(
        [
            f'<article class="sample">\n<h3>{escape(row["id"])}</h3>',
            f"<p>{'<br>'.join(escape(text) for text in lines if text)}</p>",
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
    """Format a range of seconds: "0.5 to 2 s", or "2 s" if both ends are equal."""
    return f"{start:g} s" if start == end else f"{start:g} to {end:g} s"
