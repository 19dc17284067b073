"""The paper's figures from a run, as PNG files."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .modality_gap import modality_gap


def principal_components(points: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and the `count` first principal directions (count, D) of (n, D) points, each direction's largest entry
    positive."""
    mean = points.mean(axis=0)
    _, _, directions = np.linalg.svd(points - mean, full_matrices=False)
    directions = directions[:count]
    signs = np.sign(directions[np.arange(count), np.abs(directions).argmax(axis=1)])
    return mean, directions * signs[:, None]


def plot_mean_tokens(image: np.ndarray, audio: Mapping[str, np.ndarray], path: str | os.PathLike) -> Path:
    """Mean audio tokens among mean image tokens, a panel a method, each on the principal components of what it shows
    (figure 4 of the paper).

    Args:
        image: (n, D) mean image tokens.
        audio: method -> (n, D) mean audio tokens.
        path: PNG file to write, whole or not at all.

    Raises:
        ValueError: without a method.
    """
    if not audio:
        raise ValueError("no mean audio tokens to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(audio), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(audio), squeeze=False)[0]
    for panel, (method, tokens) in zip(panels, audio.items(), strict=True):
        mean, directions = principal_components(np.concatenate([image, tokens]))
        for points, label, colour in ((image, "image", "0.6"), (tokens, "audio", "tab:red")):
            x, y = ((points - mean) @ directions.T).T
            panel.scatter(x, y, s=6, c=colour, alpha=0.6, linewidths=0, label=label)
        panel.set(title=f"{method}, gap {modality_gap(tokens, image):.2f}", xticks=[], yticks=[])
        panel.set_aspect("equal", adjustable="datalim")
    panels[0].legend(loc="best", markerscale=2, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
