"""The page of an inspection: figures, charts and samples as HTML that needs nothing but the media beside it."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from .inspection import Sample, Summary


PAGE, FIGURES, MEDIA = "index.html", "summary.json", "media"
SHOWN_LABELS = 30
LINE_HEIGHT, TEXT_WIDTH, BAR_WIDTH, COUNT_WIDTH = 20, 240, 400, 80  # of a chart, in pixels
TEXT_LENGTH = 34  # letters that fit into TEXT_WIDTH

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
th { text-align: left; font-weight: normal; padding-right: 2rem; vertical-align: top; white-space: nowrap; }
svg { max-width: 100%; height: auto; font-size: 13px; fill: currentColor; }
rect { fill: steelblue; }
article { border-top: 1px solid gray; margin-top: 2rem; }
article img { height: 9rem; margin: 0 .25rem .25rem 0; }
.broken { color: crimson; }
"""


def check_output(out: Path) -> None:
    """
    Find out before the work whether a page can be written to the folder `out`.

    Raises:
        ValueError: it holds something else than such a page, which would be replaced.
        OSError: it cannot be written.
    """
    out = out.resolve()
    with _blaming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent):
            held = {path.name for path in out.iterdir()} if out.exists() else set()
    if held and held != {PAGE, FIGURES, MEDIA}:
        raise ValueError(f"{out}: holds other files, which would be lost; give --out a new folder")


def write_page(out: Path, title: str, summary: Summary, samples: Sequence[Sample], about: dict[str, Any]) -> None:
    """
    Write index.html, summary.json and media/ into the folder `out`, whole or not at all; an older page is replaced.

    Args:
        about: fields that summary.json begins with.

    Raises:
        OSError, ValueError: as `check_output`.
    """
    check_output(out)
    out = out.resolve()
    figures = about | summary.to_dict()
    figures["samples"] = [
        {"id": sample.row["id"], "problems": [f"{problem.reason}: {problem.detail}" for problem in sample.problems]}
        for sample in samples
    ]
    with _blaming(out), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch, "new")
        (folder / MEDIA).mkdir(parents=True)
        for number, sample in enumerate(samples):
            for extension, content in sample.files.items():
                (folder / _media_name(number, extension)).write_bytes(content)
        _write_text(folder / FIGURES, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        _write_text(folder / PAGE, to_html(title, summary, samples))
        if out.exists():
            out.rename(Path(scratch, "old"))
        folder.rename(out)


@contextmanager
def _blaming(out: Path) -> Iterator[None]:
    """Errors of writing within become one line with the remedy."""
    try:
        yield
    except OSError as error:
        told = error.strerror or error
        raise OSError(f"{out}: cannot be written ({told}); give --out a folder that you may write to") from error


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode(errors="replace"))  # names of files may hold what is no Unicode


def _media_name(number: int, extension: str) -> str:
    return f"{MEDIA}/{number:03d}.{extension}"


def to_html(title: str, summary: Summary, samples: Sequence[Sample]) -> str:
    """The page; its media are named as `write_page` names them."""
    lines = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in summary.table())
    durations = [(_span(low, high), count) for low, high, count in summary.histogram()]
    articles = "\n".join(_article(number, sample) for number, sample in enumerate(samples))
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
<table>
{lines}
</table>
{_section("Durations", durations)}
{_section("Most frequent labels", summary.frequent_labels(SHOWN_LABELS))}
<h2>Samples</h2>
<p>Random clips: the sound in 16 kHz mono, and the frames of the first ten seconds.</p>
{articles}
</body>
</html>
"""


def _section(title: str, bars: Sequence[tuple[str, int]]) -> str:
    return f"<h2>{title}</h2>\n{bar_chart(bars, title)}" if bars else ""


def bar_chart(bars: Sequence[tuple[str, int]], title: str) -> str:
    """SVG of horizontal bars, one a line: what it counts on the left, its count behind it."""
    most = max(count for _, count in bars) or 1
    lines = []
    for number, (text, count) in enumerate(bars):
        top, width = number * LINE_HEIGHT, BAR_WIDTH * count / most
        short = text if len(text) <= TEXT_LENGTH else f"{text[: TEXT_LENGTH - 1]}…"
        base = top + LINE_HEIGHT - 6
        lines.append(
            f"<g><title>{escape(text)}: {count}</title>"
            f'<text x="{TEXT_WIDTH}" y="{base}" text-anchor="end">{escape(short)}</text>'
            f'<rect x="{TEXT_WIDTH + 8}" y="{top + 2}" width="{width:.1f}" height="{LINE_HEIGHT - 4}"/>'
            f'<text x="{TEXT_WIDTH + 16 + width:.1f}" y="{base}">{count:,}</text></g>'
        )
    width, height = TEXT_WIDTH + BAR_WIDTH + COUNT_WIDTH, len(bars) * LINE_HEIGHT
    head = f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}" width="{width}"'
    return "\n".join([f'{head} height="{height}">', *lines, "</svg>"])


def _article(number: int, sample: Sample) -> str:
    row = sample.row
    captions = "".join(f"<li>{escape(caption)}</li>" for caption in row["captions"])
    start = row["start"] or 0.0
    time = f"from {start:g} s" if row["end"] is None else _span(start, row["end"])
    file = next((source["path"] for source in (row["audio"], *row["frames"]) if source and source["path"]), None)
    told = [row["source"], file, time, "labels: " + (", ".join(row["labels"]) or "none")]
    media = [_element(_media_name(number, extension)) for extension in sample.files]
    problems = [
        f'<p class="broken">cannot be opened, {escape(problem.reason)}: {escape(problem.detail)}</p>'
        for problem in sample.problems
    ]
    return "\n".join(
        [
            f'<article class="sample">\n<h3>{escape(row["id"])}</h3>',
            f"<p>{'<br>'.join(escape(text) for text in told if text)}</p>",
            *problems,
            *media,
            f"<ul>{captions}</ul>" if captions else "<p>no captions</p>",
            "</article>",
        ]
    )


def _element(name: str) -> str:
    if name.endswith(".flac"):
        return f'<p><audio controls preload="none" src="{name}"></audio></p>'
    return f'<img src="{name}" alt="frame {name.split(".")[-2]}" loading="lazy">'


def _span(start: float, end: float) -> str:
    return f"{start:g} s" if start == end else f"{start:g} to {end:g} s"
