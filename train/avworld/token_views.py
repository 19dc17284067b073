"""Captioning from views of a picture's tokens, for the captioner of AVWorld."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dali_llava.processing import LlavaAudioProcessor
from dali_llava.train.avworld.unlikelihood import repetition_unlikelihood
from dali_llava.train.data.collators import IGNORED
from dali_llava.train.trainers.captioning import CaptioningTrainer


STRAYS = 0.3  # largest share of a picture's drawn tokens that come from other pictures
CONTRACTION = 0.7  # largest share of the way that drawn tokens go to the mean of their picture
REGRESSION = 0.5  # the same towards the mean of all pictures


class TokenViewTrainer(CaptioningTrainer):
    """
    Captioning from views of a picture's tokens, so that the captioner reads any set of them, not one fixed grid.

    Audio tokens are another number of tokens in another order, and sound with picture is two sets at once. What a
    sound leaves open they spread over several pictures or average over, so that they differ less than image tokens do,
    within a clip and between clips. A captioner that has only seen one grid in one order cannot read that, however
    well they are aligned. The collator chooses the view and writes its placeholders; this trainer fills them.

    Args:
        unlikelihood: weight of `repetition_unlikelihood`, added to the cross-entropy. A set of tokens shows the same
            thing many times, and cross-entropy alone does not teach a small model to name it once.
        words: (vocabulary,) bool, the words that it is about; all by default.
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
    A view of each set of tokens: all in their order if `grid`, then `extra` tokens drawn at random with replacement.

    Args:
        tokens: of each row, (N_i, width): a picture's, or those of several pictures.
        contraction: drawn tokens are moved towards the mean of their set by a share uniform in [0, contraction],
            another one a row.
        regression: they are then moved towards the mean of the whole batch, likewise.
        strays: of the drawn tokens a share uniform in [0, strays], another one a row, is then replaced by tokens of
            the whole batch.

    Returns:
        of each row, (N_i * grid + extra, width).
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
    Tokenised dialogues and the image tokens of their pictures into batches for `TokenViewTrainer`.

    A row holds `prompt_ids`, `answer_ids` and `pictures`, indices into `image_tokens`; none in a dialogue without. A
    batch shows its pictures in one view: a quarter of the batches all tokens as they are, half of them tokens drawn
    from these, as sound alone brings them, a quarter both one after the other, as sound after picture does. One view
    a batch leaves little to pad.

    Args:
        processor: of the model to train.
        image_tokens: (pictures, N, vision width), from the frozen vision tower.
        drawn: least and largest number of tokens to draw.
    """

    processor: LlavaAudioProcessor
    image_tokens: torch.Tensor
    drawn: tuple[int, int]

    def draw_view(self) -> tuple[bool, int]:
        """(grid, extra): see `token_views`."""
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
