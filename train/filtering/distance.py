"""
Distance between the visual content and the labels of a clip, and the selection of clips by this distance.

    distance(clip) = mean over frames f of 1 - cos(embed(caption_f), embed("label, label"))

This is the filter of appendix C of "An Eye for an Ear" (DALI), which keeps the 500,000 nearest pairs of AudioSet. The
paper specifies neither the distance nor how labels are converted to text; this implementation uses the cosine distance
and a comma-separated list.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dali_llava.processing.corpora.rows import open_frames

from .models import Caption, Embed


def label_text(labels: Sequence[str]) -> str:
    """Join the labels of a clip, for example to "dog, rain".

    Raises:
        ValueError: if there is no label.
    """
    labels = [label.strip() for label in labels or () if label.strip()]
    if not labels:
        raise ValueError("the row has no labels")
    return ", ".join(labels)


def caption_distances(captions: Sequence[Sequence[str]], documents: Sequence[str], embed: Embed) -> np.ndarray:
    """
    Mean distance between the captions of each clip and its document.

    Args:
        captions: captions of each of n clips, one per frame.
        documents: n texts.
        embed: function that maps texts to vectors. A zero vector has distance 1 to every vector.

    Returns:
        (n,) float64 in [0, 2].

    Raises:
        ValueError: if the numbers of clips differ, a clip has no caption, or an embedding is not finite.
    """
    counts = [len(each) for each in captions]
    if len(captions) != len(documents) or 0 in counts:
        raise ValueError(
            f"{len(documents)} documents for clips with {counts} captions: each clip needs one or more captions"
        )
    if not counts:
        return np.zeros(0)
    texts = [text for each in captions for text in each]
    # Each distinct text is embedded once: most frames of a clip share a caption, and many clips share labels.
    distinct = list(dict.fromkeys([*texts, *documents]))
    vectors = dict(zip(distinct, embed(distinct).double(), strict=True))
    seen = torch.stack([vectors[text] for text in texts])
    heard = torch.stack([vectors[text] for text in documents]).repeat_interleave(torch.tensor(counts), dim=0)
    distances = 1 - F.cosine_similarity(seen, heard, dim=1)
    if not distances.isfinite().all():
        raise ValueError("an embedding is not finite")
    return np.array([part.mean().item() for part in distances.split(counts)])


def score_clips(rows: Iterable[Mapping[str, Any]], frames: int, caption: Caption, embed: Embed) -> tuple[list, dict]:
    """
    Score clips in one batch. If the batch fails, each clip is scored alone, so that only failing clips are skipped.

    Args:
        rows: rows of a corpus.
        frames: maximum number of frames per clip.
        caption: function that captions images.
        embed: function that embeds texts.

    Returns:
        a list of {id, score, captions (one per frame), labels} in the order of the rows, and {id: reason} of the
        skipped clips.
    """
    opened, left_out = [], {}
    for row in rows:
        try:
            opened.append((row, label_text(row["labels"]), open_frames(row, most=frames)))
        except (ValueError, OSError) as error:
            left_out[row["id"]] = " ".join(str(error).split())
    try:
        return _score_opened(opened, caption, embed), left_out
    except (ValueError, OSError):
        scored = []
    for clip in opened:
        try:
            scored += _score_opened([clip], caption, embed)
        except (ValueError, OSError) as error:
            left_out[clip[0]["id"]] = " ".join(str(error).split())
    return scored, left_out


def _score_opened(clips: Sequence[tuple], caption: Caption, embed: Embed) -> list[dict]:
    """Score clips given as (row, document, frames)."""
    if not clips:
        return []
    said = iter(caption([image for _, _, images in clips for image in images]))
    captions = [[next(said) for _ in images] for _, _, images in clips]
    scores = caption_distances(captions, [document for _, document, _ in clips], embed)
    return [
        {"id": row["id"], "score": float(score), "captions": texts, "labels": list(row["labels"])}
        for (row, _, _), score, texts in zip(clips, scores, captions, strict=True)
    ]


def check_choice(keep: int | None, threshold: float | None) -> None:
    """Raise a ValueError unless exactly one of the two is given and `keep` is at least 1."""
    if (keep is None) == (threshold is None):
        raise ValueError("give either keep (the number of clips) or threshold (the upper bound of their distance)")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")


def choose(scores: np.ndarray, keep: int | None = None, threshold: float | None = None) -> np.ndarray:
    """
    Select the `keep` nearest clips (all clips if there are fewer), or the clips with a distance below `threshold`.

    Among clips with equal distances, earlier ones are kept first.

    Returns:
        (n,) bool, True for the clips to keep.

    Raises:
        ValueError: if not exactly one of `keep` and `threshold` is given, or `keep` is less than 1.
    """
    check_choice(keep, threshold)
    if keep is None:
        return np.asarray(scores) < threshold
    kept = np.zeros(len(scores), dtype=bool)
    kept[np.argsort(scores, kind="stable")[:keep]] = True
    return kept
