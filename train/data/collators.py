"""Collators that turn rows of a corpus into batches for captioning and for alignment."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from dali_llava.eval.runner import Picture, Sample, frames_of
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.processing.corpora.rows import open_audio, open_clip_frames
from dali_llava.train.data.augmentation import UNCHANGED, Augmentation
from dali_llava.train.data.clips import ClipOpener, Row, open_frame
from dali_llava.train.data.draws import Draws


IGNORED = -100  # label that cross-entropy ignores
MODALITIES = {"audio": ("audio",), "image": ("image",), "audiovisual": ("image", "audio")}  # name -> its media


def pixel_values(images: list[Image.Image], processor: LlavaAudioProcessor) -> torch.Tensor:
    """Return the processor's pixel values (B, 3, H, W) for images."""
    texts = [processor.image_token] * len(images)
    return processor(text=texts, images=images, return_tensors="pt")["pixel_values"]


def input_features(sounds: list[np.ndarray], processor: LlavaAudioProcessor) -> torch.Tensor:
    """Return the spectrograms (B, frames, mels) of waveforms (samples,) at the extractor's sampling rate."""
    extractor = processor.feature_extractor
    return extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]


def append_answers(
    input_ids: list[torch.Tensor], tokenizer, prompts: list[str], texts: list[str]
) -> dict[str, torch.Tensor]:
    """
    Append the tokens of the answers to those of the prompts, and build labels with -100 at all other positions.

    The tokens of a prompt are those that generation starts from, even where a tokenizer would merge the last of them
    with the first of the answer.

    Args:
        input_ids: (L,) per prompt, its ids after placeholders are expanded, without padding.
        tokenizer: tokenizer of the texts.
        prompts: the prompts without answers.
        texts: the same prompts with answers.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (B, L), padded on the left.

    Raises:
        ValueError: a text does not start with its prompt.
    """
    rows, labels = [], []
    with_answer, without = tokenizer(texts)["input_ids"], tokenizer(prompts)["input_ids"]
    for ids, text_ids, prompt_ids, text, prompt in zip(input_ids, with_answer, without, texts, prompts, strict=True):
        if not text.startswith(prompt):
            raise ValueError(
                f"the chat template writes {text!r} for a turn with its answer, which does not start with the prompt "
                f"{prompt!r}; use another chat template."
            )
        answer = text_ids[len(prompt_ids) :]
        if text_ids[: len(prompt_ids)] != prompt_ids:
            answer = tokenizer(text.removeprefix(prompt), add_special_tokens=False)["input_ids"]
        rows.append([*ids.tolist(), *answer])
        labels.append(torch.tensor([IGNORED] * len(ids) + answer))
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    return {**batch, "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED, padding_side="left")}


def for_evaluation(collator, rows: Dataset):
    """
    Return a copy of a collator for evaluation, whose batches are the same in every evaluation.

    It does not augment spectrograms or reword questions. A random frame is the same in every evaluation.

    Args:
        collator: collator of the training batches.
        rows: rows to evaluate on. They replace broken clips if the collator replaces them.
    """
    changes = {"draws": Draws(collator.draws.seed)}
    if hasattr(collator, "augmentation"):
        changes["augmentation"] = UNCHANGED
    if hasattr(collator, "wordings"):
        changes["wordings"] = ()
    if hasattr(collator, "opener") and collator.opener.spares is not None:
        changes["opener"] = replace(collator.opener, spares=rows)
    return replace(collator, **changes)


@dataclass
class Turn:
    """
    A question and its answer about an image (RGB) or frames, a sound (samples,), or both; `prefix` as in
    `format_prompt`.
    """

    question: str
    answer: str
    image: Picture | None = None
    audio: np.ndarray | None = None
    prefix: bool | None = None


def collate_turns(turns: list[Turn], processor: LlavaAudioProcessor) -> dict[str, torch.Tensor]:
    """Return the processor's inputs for turns, and `labels` (B, L) of the answers and their end tokens."""
    media = [
        {"image": turn.image is not None, "audio": turn.audio is not None, "prefix": turn.prefix} for turn in turns
    ]
    pairs = list(zip(turns, media, strict=True))
    prompts = [processor.format_prompt(turn.question, **own) for turn, own in pairs]
    texts = [processor.format_prompt(turn.question, answer=turn.answer, **own) for turn, own in pairs]
    images = [frames_of(turn.image) for turn in turns]
    batch = processor(
        text=prompts,
        images=images if any(images) else None,
        audio=[turn.audio for turn in turns if turn.audio is not None] or None,
        sampling_rate=processor.feature_extractor.sampling_rate,
        padding=True,
        return_tensors="pt",
    )
    asked = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return {**batch, **append_answers(asked, processor.tokenizer, prompts, texts)}


def row_modalities(row: Row, wanted: Sequence[str] = tuple(MODALITIES)) -> list[str]:
    """Return those of the `wanted` modalities whose media a row has."""
    has = {"image": bool(row["frames"]), "audio": row["audio"] is not None}
    return [name for name in wanted if all(has[kind] for kind in MODALITIES[name])]


def several_frames(processor: LlavaAudioProcessor, frame: int | None) -> dict[str, Any] | None:
    """Return `frame_options` of a processor that takes several frames, unless the index of one frame is given."""
    return processor.frame_options if processor.num_frames > 1 and frame is None else None


def picture_opener(row: Row, processor: LlavaAudioProcessor, frame: int | None) -> Callable[[], Picture]:
    """Return a function that opens what a sample of a row shows: its frames, or the one of an index, by default 0."""
    options = several_frames(processor, frame)
    return partial(open_frame, row, frame or 0) if options is None else partial(open_clip_frames, row, **options)


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
        frame: index of the frame to show; by default a random one, or frames of the whole clip if `num_frames` of the
            processor is more than 1.
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
            rows,
            self.draws(rows),
            image=self.image,
            audio=self.audio,
            second=self.frame,
            frame_options=several_frames(self.processor, self.frame),
            sampling_rate=rate,
        )
        turns = [Turn(clip.row["question"], clip.row["answer"], clip.image, clip.audio, self.prefix) for clip in clips]
        return {"id": [clip.row["id"] for clip in clips], **collate_turns(turns, self.processor)}

    def sample(self, row: Row) -> tuple[Sample, str]:
        """Return the question about a row, to generate a caption from, and the answer to it."""
        image = picture_opener(row, self.processor, self.frame) if self.image else None
        audio = partial(open_audio, row) if self.audio else None
        return Sample(row["id"], row["question"], image, audio, self.prefix), row["answer"]


@dataclass
class SupervisedCollator:
    """
    Collates captioned rows of a corpus into `id`, `input_ids`, `labels` and media, one question and answer per row.

    In each epoch, the answer is a random caption of the row, and the question is asked about a random one of the
    modalities whose media the row has. The prefix follows the media where `prefix_modalities` of the processor says
    so.

    Args:
        processor: processor of the model to train.
        question: the question.
        modalities: names of `MODALITIES`.
        wordings: wordings of the question, of which training draws one per row and epoch; by default the question.
        longest_answer: number of tokens to which captions are cut; all tokens by default.
        augmentation: augmentation of the spectrograms.
        frame: index of the frame to show; by default a random one, or frames of the whole clip if `num_frames` of the
            processor is more than 1.
        opener: opens the media and replaces broken rows.
        draws: random generators of the rows.
    """

    processor: LlavaAudioProcessor
    question: str
    modalities: Sequence[str] = ("audio",)
    wordings: Sequence[str] = ()
    longest_answer: int | None = None
    augmentation: Augmentation = UNCHANGED
    frame: int | None = None
    opener: ClipOpener = field(default_factory=ClipOpener)
    draws: Draws = field(default_factory=Draws)

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        clips, turns, heard = [], [], []
        options = {
            "second": self.frame,
            "frame_options": several_frames(self.processor, self.frame),
            "sampling_rate": self.processor.feature_extractor.sampling_rate,
        }
        for row, generator in zip(rows, self.draws(rows), strict=True):
            question = self.wordings[generator.integers(len(self.wordings))] if self.wordings else self.question
            modalities = row_modalities(row, self.modalities)
            media = dict.fromkeys(MODALITIES[modalities[generator.integers(len(modalities))]], True)
            (clip,) = self.opener([row], [generator], **options, **media)
            captions = clip.row["captions"]
            answer = self._cut(captions[generator.integers(len(captions))])
            turns.append(Turn(question, answer, clip.image, clip.audio))
            clips.append(clip)
            heard += [generator] if clip.audio is not None else []
        batch = collate_turns(turns, self.processor)
        if heard:
            batch["input_features"] = self.augmentation(batch["input_features"], heard)
        return {"id": [clip.row["id"] for clip in clips], **batch}

    def _cut(self, answer: str) -> str:
        """Cut an answer to `longest_answer` tokens."""
        if self.longest_answer is None:
            return answer
        tokenizer = self.processor.tokenizer
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return answer if len(ids) <= self.longest_answer else tokenizer.decode(ids[: self.longest_answer])

    def sample(self, row: Row) -> tuple[Sample, str]:
        """Return the question about a row in its first modality, to generate a caption from, and its first caption."""
        media = MODALITIES[row_modalities(row, self.modalities)[0]]
        image = picture_opener(row, self.processor, self.frame) if "image" in media else None
        audio = partial(open_audio, row) if "audio" in media else None
        return Sample(row["id"], self.question, image, audio), row["captions"][0]


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
