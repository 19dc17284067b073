"""How far mean audio tokens lie from mean image tokens: what alignment closes and contrast leaves open."""

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from dali_llava.processing.media import load_audio

from .evaluation import middle_frame


@torch.inference_mode()
def mean_tokens(model, processor, rows: Dataset, modality: str, batch_size: int = 100) -> np.ndarray:
    """The mean token of each row, before the projector (the paper's figure 4).

    Args:
        model: a `LlavaAudioForConditionalGeneration`.
        processor: its processor.
        rows: a split of a corpus.
        modality: "audio" or "image" (the middle frame).

    Returns:
        (rows, vision width) float32.
    """
    model, tokens = model.eval(), []
    for start in tqdm(range(0, len(rows), batch_size), desc=f"mean {modality} tokens", delay=2):
        batch = rows.select(range(start, min(start + batch_size, len(rows))))
        if modality == "audio":
            extractor = processor.feature_extractor
            rate = extractor.sampling_rate
            clips = [load_audio(row["audio"]["bytes"], sampling_rate=rate) for row in batch]
            features = extractor(clips, sampling_rate=rate, return_tensors="pt")["input_features"]
            encoded = model.model.encode_audio(features.to(model.device))
        else:
            texts = [processor.image_token] * len(batch)
            inputs = processor(text=texts, images=[middle_frame(row) for row in batch], return_tensors="pt")
            encoded = model.model.encode_image(inputs["pixel_values"].to(model.device))
        tokens.append(encoded.mean(dim=1).float().cpu().numpy())
    return np.concatenate(tokens)


def modality_gap(audio: np.ndarray, image: np.ndarray) -> float:
    """Distance of the centroids of (n, D) audio and (m, D) image tokens, in root-mean-square deviations of the image
    tokens from their centroid."""
    spread = np.sqrt(np.square(image - image.mean(axis=0)).sum(axis=1).mean())
    return float(np.linalg.norm(audio.mean(axis=0) - image.mean(axis=0)) / spread)
