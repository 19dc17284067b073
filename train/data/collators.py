"""Rows of a corpus into batches: captions to learn, and pairs of picture and sound to align."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.data.augmentation import Augmentation
from dali_llava.train.data.clips import ClipOpener


IGNORED = -100  # the label that cross-entropy skips


def pixel_values(images: list[Image.Image], processor: LlavaAudioProcessor) -> torch.Tensor:
    """(B, 3, H, W) of the images, through everything the processor does to one."""
    texts = [processor.image_token] * len(images)
    return processor(text=texts, images=images, return_tensors="pt")["pixel_values"]


def input_features(sounds: list[np.ndarray], processor: LlavaAudioProcessor) -> torch.Tensor:
    """(B, frames, mels) of waveforms (samples,) at the extractor's sampling rate."""
    extractor = processor.feature_extractor
    return extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]


def answer_labels(input_ids: torch.Tensor, tokenizer, prompts: list[str], texts: list[str]) -> torch.Tensor:
    """
    Labels for the left-padded `input_ids` of `texts`: the ids of what follows each of `prompts`, -100 before.

    Placeholders stand in both, so their expansion does not change how many tokens the answer has.
    """
    labels = torch.full_like(input_ids, IGNORED)
    with_answer, without = tokenizer(texts)["input_ids"], tokenizer(prompts)["input_ids"]
    for row, (text, prompt) in enumerate(zip(with_answer, without, strict=True)):
        answer = len(text) - len(prompt)
        labels[row, -answer:] = input_ids[row, -answer:]
    return labels


@dataclass
class CaptionCollator:
    """
    Rows with `question` and `answer` into `input_ids`, `labels` and media.

    The loss falls on the answer and its end token.

    Args:
        processor: of the model to train.
        image, audio, prefix: what stands before the question; the rows then hold `frames` or `audio`.
        frame: index of the frame to show; a random one by default.
        opener: opens the media, and draws other rows for broken ones.
    """

    processor: LlavaAudioProcessor
    image: bool = False
    audio: bool = False
    prefix: bool = False
    frame: int | None = None
    opener: ClipOpener = field(default_factory=ClipOpener)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rate = self.processor.feature_extractor.sampling_rate
        clips = self.opener(rows, image=self.image, audio=self.audio, second=self.frame, sampling_rate=rate)
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
        return dict(batch)


@dataclass
class AlignmentCollator:
    """
    Rows into pairs of picture and sound: `pixel_values` (B, 3, H, W), `input_features` (B, frames, mels).

    Rows of `train.corpus.with_features` hold `image_tokens` in place of frames; so do their batches: (B, N, width).

    Args:
        processor: of the model to train.
        augmentation: of the spectrograms.
        frame: index of the frame to align with; a random one by default.
        opener: opens the media, and draws other rows for broken ones.
    """

    processor: LlavaAudioProcessor
    augmentation: Augmentation = Augmentation()
    frame: int | None = None
    opener: ClipOpener = field(default_factory=ClipOpener)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "image_tokens" in rows[0]:
            sounds = self.augmentation(torch.stack([torch.as_tensor(row["input_features"]) for row in rows]))
            tokens = [torch.as_tensor(row["image_tokens"]) for row in rows]
            chosen = [int(torch.randint(len(frames), ())) if self.frame is None else self.frame for frames in tokens]
            shown = torch.stack([frames[i] for frames, i in zip(tokens, chosen, strict=True)])
            return {"image_tokens": shown, "input_features": sounds}
        rate = self.processor.feature_extractor.sampling_rate
        clips = self.opener(rows, image=True, audio=True, second=self.frame, sampling_rate=rate)
        sounds = input_features([clip.audio for clip in clips], self.processor)
        return {
            "pixel_values": pixel_values([clip.image for clip in clips], self.processor),
            "input_features": self.augmentation(sounds),
        }
