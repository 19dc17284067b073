"""Audio and image tokens of a corpus, their means, and the gap between the two modalities."""

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from dali_llava.processing.corpora.rows import open_audio, open_middle_frame


@torch.inference_mode()
def encode_rows(model, processor, rows: Dataset, modality: str, batch_size: int = 100) -> torch.Tensor:
    """
    The tokens of each row, before the projector.

    Args:
        model: a `LlavaAudioForConditionalGeneration`.
        processor: its processor.
        rows: a split of a corpus.
        modality: "audio" or "image" (the middle frame).

    Returns:
        (rows, tokens, vision width) float32, on the CPU.
    """
    model, tokens = model.eval(), []
    for start in tqdm(range(0, len(rows), batch_size), desc=f"{modality} tokens", delay=2):
        batch = rows.select(range(start, min(start + batch_size, len(rows))))
        if modality == "audio":
            extractor = processor.feature_extractor
            rate = extractor.sampling_rate
            clips = [open_audio(row, rate) for row in batch]
            features = extractor(clips, sampling_rate=rate, return_tensors="pt")["input_features"]
            encoded = model.model.encode_audio(features.to(model.device))
        else:
            texts = [processor.image_token] * len(batch)
            inputs = processor(text=texts, images=[open_middle_frame(row) for row in batch], return_tensors="pt")
            encoded = model.model.encode_image(inputs["pixel_values"].to(model.device))
        tokens.append(encoded.float().cpu())
    return torch.cat(tokens)


def mean_tokens(model, processor, rows: Dataset, modality: str, batch_size: int = 100) -> np.ndarray:
    """(rows, vision width) float32: the mean token of each row (the paper's figure 4); see `encode_rows`."""
    return encode_rows(model, processor, rows, modality, batch_size).mean(dim=1).numpy()


def modality_gap(audio: np.ndarray, image: np.ndarray) -> float:
    """
    Distance between the centroids of (n, D) audio tokens and (m, D) image tokens.

    The unit is the root-mean-square deviation of the image tokens from their centroid.
    """
    spread = np.sqrt(np.square(image - image.mean(axis=0)).sum(axis=1).mean())
    return float(np.linalg.norm(audio.mean(axis=0) - image.mean(axis=0)) / spread)
