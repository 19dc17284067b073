"""Training of AVWorld's captioner on views of the image tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.avworld.unlikelihood import repetition_unlikelihood
from dali_llava.train.data.clips import Row
from dali_llava.train.data.collators import IGNORED
from dali_llava.train.data.draws import Draws
from dali_llava.train.trainers.captioning import CaptioningTrainer


STRAYS = 0.3  # maximum share of the drawn tokens that are replaced with tokens of other pictures
CONTRACTION = 0.7  # maximum share by which drawn tokens are moved towards the mean of their picture
REGRESSION = 0.5  # the same, towards the mean of all pictures


class TokenViewTrainer(CaptioningTrainer):
    """
    Trains captioning from views of image tokens, so that the captioner reads any set of tokens, not one fixed grid.

    Audio tokens differ from image tokens in number and order, and audio with image is two sets at once. If a sound
    leaves something open, its tokens spread over several pictures or average over them, so that they vary less than
    image tokens, within a clip and between clips. A captioner that has only seen one grid in one order cannot read
    such tokens, even if they are well aligned. The collator draws the views, and this trainer projects them.

    Args:
        unlikelihood: weight of `repetition_unlikelihood`, which is added to the cross-entropy. A set of tokens shows
            the same thing many times, and cross-entropy alone does not teach a small model to name it once.
        words: (vocabulary,) bool, the words that the unlikelihood applies to; all by default.
    """

    def __init__(self, *args, unlikelihood: float = 0.0, words: torch.Tensor | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.unlikelihood, self.words = unlikelihood, words

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        views = inputs.pop("image_tokens", None)
        if views is not None:
            projected = self.pretrained.model.multi_modal_projector(torch.cat(views))
            tokens = list(projected.split([len(view) for view in views]))
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        if not self.unlikelihood:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        repetition = repetition_unlikelihood(outputs["logits"], inputs["labels"], self.words, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            repetition = repetition * self.args.world_size  # as the cross-entropy: the divisor counts all ranks
        if model.training:
            self.monitor.add({"cross_entropy": loss, "unlikelihood": repetition})
        loss = loss + self.unlikelihood * repetition
        return (loss, outputs) if return_outputs else loss


def token_views(
    tokens: list[torch.Tensor],
    generators: Sequence[np.random.Generator],
    grid: bool,
    extra: int,
    strays: float = STRAYS,
    contraction: float = CONTRACTION,
    regression: float = REGRESSION,
) -> list[torch.Tensor]:
    """
    Create a view of each set of tokens: all tokens in order if `grid`, then `extra` tokens drawn with replacement.

    Args:
        tokens: one tensor (N_i, width) per row, the tokens of one or several pictures.
        generators: random generators of the rows.
        grid: whether the view starts with all tokens.
        extra: number of tokens to draw.
        strays: a share of the drawn tokens, drawn from U(0, strays) per row, is replaced with tokens of the whole
            batch, after the two steps below.
        contraction: drawn tokens are first moved towards the mean of their set, by a share drawn from
            U(0, contraction) per row.
        regression: they are then moved towards the mean of the batch, by a share drawn from U(0, regression) per row.

    Returns:
        one tensor (N_i * grid + extra, width) per row.
    """
    everything, views = torch.cat(tokens), []
    middle = everything.mean(dim=0, keepdim=True)
    for own, generator in zip(tokens, generators, strict=True):
        drawn = own[generator.integers(len(own), size=extra)]
        drawn = torch.lerp(drawn, own.mean(dim=0, keepdim=True), contraction * generator.random())
        drawn = torch.lerp(drawn, middle, regression * generator.random())
        stray = torch.from_numpy(generator.random((extra, 1)) < strays * generator.random())
        drawn = torch.where(stray, everything[generator.integers(len(everything), size=extra)], drawn)
        views.append(torch.cat([own, drawn]) if grid else drawn)
    return views


@dataclass
class TokenViewCollator:
    """
    Collates tokenized dialogues and the image tokens of their pictures into batches for `TokenViewTrainer`.

    A row has `id`, `prompt_ids`, `answer_ids` and `pictures`, a possibly empty list of indices into `image_tokens`.
    The `image_tokens` of a batch are the views of its rows with pictures. All rows of a batch have the same kind of
    view, drawn with the generator of the first row, which keeps the padding short. A quarter of the batches show all
    tokens, half show drawn tokens (as audio does), and a quarter show both in sequence (as audio after an image does).

    Args:
        processor: processor of the model to train.
        image_tokens: (pictures, N, vision width), output of the frozen vision tower.
        drawn: minimum and maximum number of tokens to draw.
        draws: random generators of the rows.
    """

    processor: LlavaAudioProcessor
    image_tokens: torch.Tensor
    drawn: tuple[int, int]
    draws: Draws = field(default_factory=Draws)

    def draw_view(self, generator: np.random.Generator) -> tuple[bool, int]:
        """Draw the kind of view of a batch; returns `grid` and `extra` of `token_views`."""
        kind = generator.integers(4)
        extra = int(generator.integers(self.drawn[0], self.drawn[1] + 1)) if kind > 0 else 0
        return kind in (0, 1), extra

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        image_id, generators = self.processor.image_token_id, self.draws(rows)
        grid, extra = self.draw_view(generators[0])
        prompts, tokens, own_generators = [], [], []
        for row, generator in zip(rows, generators, strict=True):
            ids = torch.tensor(row["prompt_ids"])
            if row["pictures"]:
                own = self.image_tokens[row["pictures"]].flatten(0, 1)
                ids = ids.repeat_interleave(torch.where(ids == image_id, len(own) * grid + extra, 1))
                tokens.append(own)
                own_generators.append(generator)
            prompts.append(ids)
        answers = [torch.tensor(row["answer_ids"]) for row in rows]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        input_ids = torch.full((len(rows), longest), self.processor.tokenizer.pad_token_id)
        attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            input_ids[index, -len(prompt) - len(answer) :] = torch.cat([prompt, answer])
            attention_mask[index, -len(prompt) - len(answer) :] = 1
            labels[index, -len(answer) :] = answer
        names = [row["id"] for row in rows]
        batch = {"id": names, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if tokens:
            batch["image_tokens"] = token_views(tokens, own_generators, grid, extra)
        return batch
