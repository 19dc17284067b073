"""The figures of the paper for a run, as PNG files."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dali_llava.atomic import atomic_path

from .mean_tokens import modality_gap


def principal_components(points: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """
    The mean (D,) and the first principal directions (count, D) of (n, D) points.

    The entry of largest magnitude in each direction is positive.
    """
    mean = points.mean(axis=0)
    _, _, directions = np.linalg.svd(points - mean, full_matrices=False)
    directions = directions[:count]
    signs = np.sign(directions[np.arange(count), np.abs(directions).argmax(axis=1)])
    return mean, directions * signs[:, None]


def plot_mean_tokens(image: np.ndarray, audio: Mapping[str, np.ndarray], path: str | os.PathLike) -> Path:
    """
    Plot mean audio tokens and mean image tokens, with one panel per method (figure 4 of the paper).

    Each panel projects its points onto their own principal components.

    Args:
        image: (n, D) mean image tokens.
        audio: method -> (n, D) mean audio tokens.
        path: PNG file to write.

    Raises:
        ValueError: `audio` contains no method.
    """
    if not audio:
        raise ValueError("no mean audio tokens to plot")
    figure = new_figure(3.2 * len(audio), 3.4)
    panels = figure.subplots(1, len(audio), squeeze=False)[0]
    for panel, (method, tokens) in zip(panels, audio.items(), strict=True):
        mean, directions = principal_components(np.concatenate([image, tokens]))
        for points, label, colour in ((image, "image", "0.6"), (tokens, "audio", "tab:red")):
            x, y = ((points - mean) @ directions.T).T
            panel.scatter(x, y, s=6, c=colour, alpha=0.6, linewidths=0, label=label)
        panel.set(title=f"{method}, gap {modality_gap(tokens, image):.2f}", xticks=[], yticks=[])
        panel.set_aspect("equal", adjustable="datalim")
    panels[0].legend(loc="best", markerscale=2, frameon=False)
    return save_figure(figure, path)


def plot_attention(
    pictures: Sequence[Image.Image], maps: np.ndarray, captions: Sequence[str], path: str | os.PathLike
) -> Path:
    """
    Plot pictures above the attention weights of their tokens in OT^Att (figure 7 of the paper).

    Args:
        pictures: n pictures.
        maps: (n, rows, columns) weights; 1 is the uniform weight.
        captions: titles of the pictures.
        path: PNG file to write.

    Raises:
        ValueError: there are no pictures, or the numbers of pictures, maps and captions differ.
    """
    if not len(pictures) == len(maps) == len(captions) > 0:
        raise ValueError(f"{len(pictures)} pictures, {len(maps)} maps, {len(captions)} captions: numbers must match")
    figure = new_figure(1.9 * len(pictures), 4.2)
    panels = figure.subplots(2, len(pictures), squeeze=False)
    limit = max(2.0, float(maps.max()))
    for (above, below), picture, weights, caption in zip(panels.T, pictures, maps, captions, strict=True):
        above.imshow(picture)
        above.set_title("\n".join(textwrap.wrap(caption, 22)), fontsize=8)
        drawn = below.imshow(weights, vmin=0.0, vmax=limit, cmap="magma")
        for panel in (above, below):
            panel.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=panels[1].tolist(), label="weight (uniform: 1)")
    return save_figure(figure, path)


def new_figure(width: float, height: float):
    """Create a figure of the given size in inches, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: str | os.PathLike) -> Path:
    """Write a PNG file atomically, and create its folder if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path
