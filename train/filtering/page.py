"""Report of the pre-filter: number of clips kept, histogram of distances, and the nearest and farthest clips."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from datasets import Dataset

from dali_llava.eval.figures import new_figure, save_figure
from dali_llava.processing.inspect.clip_page import (
    MEDIA,
    PAGE,
    article,
    check_folder,
    new_folder,
    open_clip,
    to_page,
    to_table,
    write_media,
    write_text,
)


FOLDER = {PAGE, MEDIA}, "--output_dir"  # contents of the report, and the option that sets its parent folder
SHOWN = 10  # nearest and farthest clips shown
MAX_FRAMES = 100  # frames shown per clip
HISTOGRAM = f"{MEDIA}/histogram.png"


def check_report(out: Path) -> None:
    """Check that the report can be written to the folder `out`; raises OSError or ValueError as `check_folder`."""
    check_folder(out, *FOLDER)


def write_report(
    out: Path, rows: Dataset, scored: Sequence[Mapping], left_out: Mapping[str, str], choice: str
) -> None:
    """
    Write index.html and media/ to the folder `out` atomically. An older report is replaced.

    Args:
        out: folder of the report.
        rows: n rows of the corpus. Only the media of the clips shown are opened; the page reports broken media.
        scored: {id, score, captions (one per frame), labels, kept} for each of the n >= 1 rows.
        left_out: reasons of the clips without a score, by id.
        choice: description of the selection rule.

    Raises:
        OSError, ValueError: as in `check_report`.
    """
    scores = np.array([clip["score"] for clip in scored])
    kept = np.array([clip["kept"] for clip in scored])
    ranks = np.argsort(scores, kind="stable").tolist()
    nearest, farthest = ranks[:SHOWN], ranks[::-1][:SHOWN]
    shown = list(dict.fromkeys(nearest + farthest))  # if there are few clips, some are in both lists
    samples = [open_clip(rows[index], min(len(scored[index]["captions"]), MAX_FRAMES)) for index in shown]
    articles = {}
    for number, (index, sample) in enumerate(zip(shown, samples, strict=True)):
        clip = scored[index]
        facts = f"distance {clip['score']:.4f}, {'kept' if clip['kept'] else 'not kept'}"
        articles[index] = article(number, sample, clip["captions"], facts)
    count = f"{kept.sum()} of {len(kept)} scored clips kept: {choice}."
    if kept.any():
        count += f" Their largest distance is {scores[kept].max():.4f}."
    sections = [
        f"<p>{escape(count)}</p>",
        f'<p><img src="{HISTOGRAM}" alt="histogram of the distances"></p>',
        "<p>Each clip is shown with its audio (16 kHz mono), its captioned frames and their captions in order.</p>",
        "<h2>Nearest</h2>",
        *(articles[index] for index in nearest),
        "<h2>Farthest</h2>",
        *(articles[index] for index in farthest),
    ]
    if left_out:
        sections += [f"<h2>Without a score ({len(left_out)})</h2>", to_table(list(left_out.items()))]
    with new_folder(out, *FOLDER) as folder:
        write_media(folder, samples)
        plot_scores(scores, kept, folder / HISTOGRAM)
        write_text(folder / PAGE, to_page("Pre-filter", *sections))


def plot_scores(scores: np.ndarray, kept: np.ndarray, path: Path) -> None:
    """Save a histogram of the (n,) distances as PNG. Clips that are kept, (n,) bool, are coloured."""
    figure = new_figure(4.8, 3.2)
    panel = figure.subplots()
    edges = np.histogram_bin_edges(scores, bins=40)
    shares = [scores[kept], scores[~kept]]
    panel.hist(shares, bins=edges, stacked=True, color=["tab:red", "0.6"], label=["kept", "not kept"])
    panel.set(xlabel="distance between captions and labels", ylabel="clips")
    panel.legend(frameon=False)
    save_figure(figure, path)
