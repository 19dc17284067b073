"""Attention maps of OT^Att on pictures (figure 7 of the paper), and their mean weight by content in AVWorld."""

import numpy as np
import torch
from datasets import Dataset

from dali_llava.processing.corpora.avworld.avworld import scene_of

from ..mean_tokens import encode_rows


@torch.inference_mode()
def image_attention(model, processor, attention: torch.nn.Module, rows: Dataset) -> np.ndarray:
    """
    Attention weights of the image tokens for the sound of each clip, before mixing with uniform weights.

    Args:
        model: the aligned `LlavaAudioForConditionalGeneration`.
        processor: the processor of the model.
        attention: `AlignmentAttention` of the same alignment; see `load_alignment_attention`.
        rows: a split of a corpus. The map is for the middle frame.

    Returns:
        (rows, side, side) float32 weights on the grid of image tokens; 1 is the uniform weight.
    """
    audio, image = (encode_rows(model, processor, rows, modality) for modality in ("audio", "image"))
    return attention.eval().image_map(audio, image).numpy()


def attention_by_content(maps: np.ndarray, rows: Dataset) -> dict[str, float]:
    """
    Mean weight of the cells of AVWorld by content: an object that `sounds`, a `silent` object, or empty `ground`.

    Args:
        maps: (rows, side, side), one token per cell, as returned by `image_attention`.
        rows: rows of AVWorld, generated with its default seed.
    """
    found: dict[str, list[float]] = {"sounds": [], "silent": [], "ground": []}
    for name, weights in zip(rows["id"], maps, strict=True):
        split, index = name.rsplit("-", 1)
        scene, _ = scene_of(split, int(index))
        kinds = {entity.cell: "silent" if entity.span is None else "sounds" for entity in scene.visible}
        for cell, weight in enumerate(weights.flat):
            found[kinds.get(cell, "ground")].append(float(weight))
    return {kind: float(np.mean(weights)) for kind, weights in found.items()}
