"""The pre-filter's report: how many clips were kept, their distances, and the clips at either end to hear and see."""

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


FOLDER = {PAGE, MEDIA}, "--output_dir"  # what it holds, and the option that names the folder around it
SHOWN = 10  # clips at either end
MAX_FRAMES = 100  # shown of a clip
HISTOGRAM = f"{MEDIA}/histogram.png"


def check_report(out: Path) -> None:
    """OSError or ValueError, as `check_folder` has them, where the report cannot be written to the folder `out`."""
    check_folder(out, *FOLDER)


def write_report(
    out: Path, rows: Dataset, scored: Sequence[Mapping], left_out: Mapping[str, str], choice: str
) -> None:
    """
    Write index.html and media/ into the folder `out`, whole or not at all; an older report is replaced.

    Args:
        rows: of the corpus, n of them. The media of those shown are opened; a broken one is told on the page.
        scored: {id, score, captions (one a frame), labels, kept} of each of the rows, one or more.
        left_out: id -> reason of the clips without a score.
        choice: how those kept were chosen, in words.

    Raises:
        OSError, ValueError: as `check_report`.
    """
    scores = np.array([clip["score"] for clip in scored])
    kept = np.array([clip["kept"] for clip in scored])
    ranks = np.argsort(scores, kind="stable").tolist()
    nearest, farthest = ranks[:SHOWN], ranks[::-1][:SHOWN]
    shown = list(dict.fromkeys(nearest + farthest))  # of few clips some stand at both ends
    samples = [open_clip(rows[index], min(len(scored[index]["captions"]), MAX_FRAMES)) for index in shown]
    articles = {}
    for number, (index, sample) in enumerate(zip(shown, samples, strict=True)):
        clip = scored[index]
        facts = f"distance {clip['score']:.4f}, {'kept' if clip['kept'] else 'left out'}"
        articles[index] = article(number, sample, clip["captions"], facts)
    count = f"{kept.sum()} of {len(kept)} scored clips kept: {choice}."
    if kept.any():
        count += f" The farthest of them lies at {scores[kept].max():.4f}."
    sections = [
        f"<p>{escape(count)}</p>",
        f'<p><img src="{HISTOGRAM}" alt="histogram of the distances"></p>',
        "<p>Of each clip the sound in 16 kHz mono, the frames that were captioned, and their captions in turn.</p>",
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
    """A histogram of the (n,) distances as a PNG; those that were kept, (n,) bool, in colour."""
    figure = new_figure(4.8, 3.2)
    panel = figure.subplots()
    edges = np.histogram_bin_edges(scores, bins=40)
    shares = [scores[kept], scores[~kept]]
    panel.hist(shares, bins=edges, stacked=True, color=["tab:red", "0.6"], label=["kept", "left out"])
    panel.set(xlabel="distance of captions and labels", ylabel="clips")
    panel.legend(frameon=False)
    save_figure(figure, path)
