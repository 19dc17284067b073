"""
How far what is seen lies from what is heard, and the choice of the clips where it is near.

    distance(clip) = mean over frames f of 1 - cos(embed(caption_f), embed("label, label"))

This is the filter of appendix C of "An Eye for an Ear" (DALI), which keeps the 500,000 nearest pairs of AudioSet. The
paper names neither the distance nor how labels become a text: cosine, and a list with commas, are our choice.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dali_llava.processing.corpora.rows import open_frames

from .models import Caption, Embed


def label_text(labels: Sequence[str]) -> str:
    """The labels of a clip as a document: "dog, rain". ValueError without one."""
    labels = [label.strip() for label in labels or () if label.strip()]
    if not labels:
        raise ValueError("the row has no labels")
    return ", ".join(labels)


def caption_distances(captions: Sequence[Sequence[str]], documents: Sequence[str], embed: Embed) -> np.ndarray:
    """
    Mean distance of each clip's captions to its document.

    Args:
        captions: of each of n clips, one a frame.
        documents: n texts.
        embed: texts to vectors. One of length zero lies at distance 1 from all.

    Returns:
        (n,) float64 in [0, 2].

    Raises:
        ValueError: other numbers of clips, a clip without caption, or an embedding that is not finite.
    """
    counts = [len(each) for each in captions]
    if len(captions) != len(documents) or 0 in counts:
        raise ValueError(f"{len(documents)} documents, and clips of {counts} captions: give each clip one or more")
    if not counts:
        return np.zeros(0)
    texts = [text for each in captions for text in each]
    # Frames of a clip mostly share their caption, and clips their labels.
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
    Score clips in one batch; where that fails, each alone, so that the rest go on.

    Args:
        rows: of a corpus.
        frames: most frames of a clip.

    Returns:
        a list of {id, score, captions (one a frame), labels}, in the rows' order; and {id: reason} of the others.
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
    """The scores of clips given as (row, document, frames)."""
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
    """ValueError unless just one is given, `keep` of at least 1."""
    if (keep is None) == (threshold is None):
        raise ValueError("give either keep (how many clips) or threshold (the distance they stay under)")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")


def choose(scores: np.ndarray, keep: int | None = None, threshold: float | None = None) -> np.ndarray:
    """
    Which clips to keep: the `keep` nearest (all, where there are fewer), or those under `threshold`.

    Of equally near clips the earlier one is kept first.

    Returns:
        (n,) bool.

    Raises:
        ValueError: unless just one of the two is given, `keep` of at least 1.
    """
    check_choice(keep, threshold)
    if keep is None:
        return np.asarray(scores) < threshold
    kept = np.zeros(len(scores), dtype=bool)
    kept[np.argsort(scores, kind="stable")[:keep]] = True
    return kept
