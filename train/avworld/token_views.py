"""Training of AVWorld's captioner on views of the image tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.avworld.unlikelihood import repetition_unlikelihood
from dali_llava.train.data.collators import IGNORED
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
    such tokens, even if they are well aligned. The collator selects the view and inserts its placeholders, and this
    trainer computes the tokens.

    Args:
        unlikelihood: weight of `repetition_unlikelihood`, which is added to the cross-entropy. A set of tokens shows
            the same thing many times, and cross-entropy alone does not teach a small model to name it once.
        words: (vocabulary,) bool, the words that the unlikelihood applies to; all by default.
    """

    def __init__(self, *args, unlikelihood: float = 0.0, words: torch.Tensor | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.unlikelihood, self.words = unlikelihood, words

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        view = inputs.pop("view", None)
        if view is not None:
            views = token_views(inputs.pop("image_tokens"), *view)
            projected = self.pretrained.model.multi_modal_projector(torch.cat(views))
            tokens = list(projected.split([len(view) for view in views]))
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        if not self.unlikelihood:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        repetition = repetition_unlikelihood(outputs["logits"], inputs["labels"], self.words, num_items_in_batch)
        if model.training:
            self.monitor.add({"cross_entropy": loss, "unlikelihood": repetition})
        loss = loss + self.unlikelihood * repetition
        return (loss, outputs) if return_outputs else loss


def token_views(
    tokens: list[torch.Tensor],
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
    for own in tokens:
        drawn = own[torch.randint(len(own), (extra,))]
        drawn = torch.lerp(drawn, own.mean(dim=0, keepdim=True), contraction * float(torch.rand(())))
        drawn = torch.lerp(drawn, middle, regression * float(torch.rand(())))
        stray = torch.rand(extra, 1) < strays * torch.rand(())
        drawn = torch.where(stray, everything[torch.randint(len(everything), (extra,))], drawn)
        views.append(torch.cat([own, drawn]) if grid else drawn)
    return views


@dataclass
class TokenViewCollator:
    """
    Collates tokenized dialogues and the image tokens of their pictures into batches for `TokenViewTrainer`.

    A row has `prompt_ids`, `answer_ids` and `pictures`, a possibly empty list of indices into `image_tokens`. All
    rows of a batch have the same view, which keeps the padding short. A quarter of the batches show all tokens, half
    show drawn tokens (as audio does), and a quarter show both in sequence (as audio after an image does).

    Args:
        processor: processor of the model to train.
        image_tokens: (pictures, N, vision width), output of the frozen vision tower.
        drawn: minimum and maximum number of tokens to draw.
    """

    processor: LlavaAudioProcessor
    image_tokens: torch.Tensor
    drawn: tuple[int, int]

    def draw_view(self) -> tuple[bool, int]:
        """Draw the view of a batch; returns `grid` and `extra` of `token_views`."""
        kind = int(torch.randint(4, ()))
        extra = int(torch.randint(self.drawn[0], self.drawn[1] + 1, ())) if kind > 0 else 0
        return kind in (0, 1), extra

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        image_id = self.processor.image_token_id
        grid, extra = self.draw_view()
        tokens = [self.image_tokens[row["pictures"]].flatten(0, 1) for row in rows]
        prompts = []
        for row, own in zip(rows, tokens, strict=True):
            ids = torch.tensor(row["prompt_ids"])
            prompts.append(ids.repeat_interleave(torch.where(ids == image_id, len(own) * grid + extra, 1)))
        answers = [torch.tensor(row["answer_ids"]) for row in rows]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        input_ids = torch.full((len(rows), longest), self.processor.tokenizer.pad_token_id)
        attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            input_ids[index, -len(prompt) - len(answer) :] = torch.cat([prompt, answer])
            attention_mask[index, -len(prompt) - len(answer) :] = 1
            labels[index, -len(answer) :] = answer
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        tokens = [own for own in tokens if len(own)]
        if tokens:
            batch.update(image_tokens=tokens, view=(grid, extra))
        return batch
