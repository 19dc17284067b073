"""Write the page of an inspection: statistics, charts and samples."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dali_llava.processing.inspect.clip_page import (
    MEDIA,
    PAGE,
    ClipSample,
    article,
    check_folder,
    new_folder,
    span,
    to_page,
    to_table,
    write_media,
    write_text,
)
from dali_llava.processing.inspect.summary import CorpusSummary


FIGURES = "summary.json"
FOLDER = {PAGE, FIGURES, MEDIA}, "--out"  # its files and folders, and the option that sets it
SHOWN_LABELS = 30
LINE_HEIGHT, TEXT_WIDTH, BAR_WIDTH, COUNT_WIDTH = 20, 240, 400, 80  # sizes of a chart in pixels
TEXT_LENGTH = 34  # characters that fit into TEXT_WIDTH


def check_output(out: Path) -> None:
    """
    Check that the page can be written to the folder `out`.

    Raises:
        OSError, ValueError: as in `check_folder`.
    """
    check_folder(out, *FOLDER)


def write_page(
    out: Path, title: str, summary: CorpusSummary, samples: Sequence[ClipSample], about: dict[str, Any]
) -> None:
    """
    Write index.html, summary.json and media/ to the folder `out` atomically. An existing page is replaced.

    Args:
        out: folder to write.
        title: title of the page, in plain text.
        summary: statistics of the corpus.
        samples: clips to show.
        about: first fields of summary.json.

    Raises:
        OSError, ValueError: as in `check_output`.
    """
    figures = about | summary.to_dict()
    figures["samples"] = [
        {"id": sample.row["id"], "problems": [f"{problem.reason}: {problem.detail}" for problem in sample.problems]}
        for sample in samples
    ]
    with new_folder(out, *FOLDER) as folder:
        write_media(folder, samples)
        write_text(folder / FIGURES, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / PAGE, to_html(title, summary, samples))


def to_html(title: str, summary: CorpusSummary, samples: Sequence[ClipSample]) -> str:
    """Return the HTML of the page, with the media under the names of `write_media`."""
    durations = [(span(low, high), count) for low, high, count in summary.histogram()]
    return to_page(
        title,
        to_table(summary.table()),
        _section("Durations", durations),
        _section("Most frequent labels", summary.frequent_labels(SHOWN_LABELS)),
        "<h2>Samples</h2>",
        "<p>Random clips: the sound in 16 kHz mono, and the frames of the first ten seconds.</p>",
        *(article(number, sample, sample.row["captions"]) for number, sample in enumerate(samples)),
    )


def _section(title: str, bars: Sequence[tuple[str, int]]) -> str:
    return f"<h2>{title}</h2>\n{bar_chart(bars, title)}" if bars else ""


def bar_chart(bars: Sequence[tuple[str, int]], title: str) -> str:
    """Return an SVG of horizontal bars, one per line, with the name on the left and the count on the right."""
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
