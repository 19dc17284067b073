"""Collators that turn rows of a corpus into batches for captioning and for alignment."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.data.augmentation import UNCHANGED, Augmentation
from dali_llava.train.data.clips import ClipOpener, Row
from dali_llava.train.data.draws import Draws


IGNORED = -100  # label that cross-entropy ignores


def pixel_values(images: list[Image.Image], processor: LlavaAudioProcessor) -> torch.Tensor:
    """Return the processor's pixel values (B, 3, H, W) for images."""
    texts = [processor.image_token] * len(images)
    return processor(text=texts, images=images, return_tensors="pt")["pixel_values"]


def input_features(sounds: list[np.ndarray], processor: LlavaAudioProcessor) -> torch.Tensor:
    """Return the spectrograms (B, frames, mels) of waveforms (samples,) at the extractor's sampling rate."""
    extractor = processor.feature_extractor
    return extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]


def answer_labels(input_ids: torch.Tensor, tokenizer, prompts: list[str], texts: list[str]) -> torch.Tensor:
    """
    Build labels for the answers in left-padded `input_ids`, with -100 at all other positions.

    Prompts and texts contain the same placeholders, so their expansion does not change the length of the answer.

    Args:
        input_ids: (B, L), the ids of `texts` after placeholders are expanded.
        tokenizer: tokenizer of the texts.
        prompts: the prompts without answers.
        texts: the same prompts with answers.

    Returns:
        (B, L) labels.
    """
    labels = torch.full_like(input_ids, IGNORED)
    with_answer, without = tokenizer(texts)["input_ids"], tokenizer(prompts)["input_ids"]
    for row, (text, prompt) in enumerate(zip(with_answer, without, strict=True)):
        answer = len(text) - len(prompt)
        labels[row, -answer:] = input_ids[row, -answer:]
    return labels


def for_evaluation(collator, rows: Dataset):
    """
    Return a copy of a collator for evaluation, whose batches are the same in every evaluation.

    It does not augment spectrograms. A random frame is the same in every evaluation.

    Args:
        collator: collator of the training batches.
        rows: rows to evaluate on. They replace broken clips if the collator replaces them.
    """
    changes = {"draws": Draws(collator.draws.seed)}
    if hasattr(collator, "augmentation"):
        changes["augmentation"] = UNCHANGED
    if hasattr(collator, "opener") and collator.opener.spares is not None:
        changes["opener"] = replace(collator.opener, spares=rows)
    return replace(collator, **changes)


@dataclass
class CaptionCollator:
    """
    Collates rows with `id`, `question` and `answer` into `id`, `input_ids`, `labels` and media.

    The labels cover the answer and its end token.

    Args:
        processor: processor of the model to train.
        image: whether the image precedes the question; rows then need `frames`.
        audio: whether the audio precedes the question; rows then need `audio`.
        prefix: whether the prefix precedes the question.
        frame: index of the frame to show; random by default.
        opener: opens the media and replaces broken rows.
        draws: random generators of the rows.
    """

    processor: LlavaAudioProcessor
    image: bool = False
    audio: bool = False
    prefix: bool = False
    frame: int | None = None
    opener: ClipOpener = field(default_factory=ClipOpener)
    draws: Draws = field(default_factory=Draws)

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        rate = self.processor.feature_extractor.sampling_rate
        clips = self.opener(
            rows, self.draws(rows), image=self.image, audio=self.audio, second=self.frame, sampling_rate=rate
        )
        rows = [clip.row for clip in clips]
        media = {"image": self.image, "audio": self.audio, "prefix": self.prefix}
        prompts = [self.processor.format_prompt(row["question"], **media) for row in rows]
        texts = [self.processor.format_prompt(row["question"], answer=row["answer"], **media) for row in rows]
        batch = self.processor(
            text=texts,
            images=[clip.image for clip in clips] if self.image else None,
            audio=[clip.audio for clip in clips] if self.audio else None,
            sampling_rate=rate,
            padding=True,
            return_tensors="pt",
        )
        batch["labels"] = answer_labels(batch["input_ids"], self.processor.tokenizer, prompts, texts)
        return {"id": [row["id"] for row in rows], **batch}


@dataclass
class AlignmentCollator:
    """
    Collates rows into `id` and pairs of image and audio: `pixel_values` (B, 3, H, W) and `input_features` (B, frames,
    mels).

    For rows of `with_features`, batches contain `image_tokens` (B, N, width) in place of `pixel_values`: those of a
    random frame among the stored ones. Their spectrograms may be stored or not.

    Args:
        processor: processor of the model to train.
        augmentation: augmentation of the spectrograms.
        frame: index of the frame to align with; random by default.
        opener: opens the media and replaces broken rows.
        draws: random generators of the rows.
    """

    processor: LlavaAudioProcessor
    augmentation: Augmentation = Augmentation()
    frame: int | None = None
    opener: ClipOpener = field(default_factory=ClipOpener)
    draws: Draws = field(default_factory=Draws)

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        generators = self.draws(rows)
        stored = "image_tokens" in rows[0]
        if "input_features" in rows[0]:
            sounds = torch.stack([torch.as_tensor(row["input_features"]) for row in rows])
        else:
            rate = self.processor.feature_extractor.sampling_rate
            clips = self.opener(rows, generators, image=not stored, audio=True, second=self.frame, sampling_rate=rate)
            sounds = input_features([clip.audio for clip in clips], self.processor)
            rows = [clip.row for clip in clips]
        if stored:
            shown = [
                row["image_tokens"][generator.integers(len(row["image_tokens"])) if self.frame is None else self.frame]
                for row, generator in zip(rows, generators, strict=True)
            ]
            image = {"image_tokens": torch.stack([torch.as_tensor(tokens) for tokens in shown])}
        else:
            image = {"pixel_values": pixel_values([clip.image for clip in clips], self.processor)}
        names = [row["id"] for row in rows]
        return {"id": names, **image, "input_features": self.augmentation(sounds, generators)}
