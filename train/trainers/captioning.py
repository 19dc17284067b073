"""Next-token training of captions: the captioner itself, the prefix, the audio projector."""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .stage import StageTrainer


class CaptioningTrainer(StageTrainer):
    """Negative log-likelihood of the answers, with what the collator gives (DALI, stages 1a and 2)."""

    def __init__(self, model, **kwargs):
        super().__init__(model=model, captioner=model, **kwargs)


class TokenViewTrainer(CaptioningTrainer):
    """
    Captioning from views of a picture's tokens, so that the captioner reads any set of them, not one fixed grid.

    Audio tokens are another number of tokens in another order, and sound with picture is two sets at once. A
    captioner that has only seen one grid in one order cannot read either, however well they are aligned. The
    collator draws the view and writes its placeholders; this trainer fills them.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        view = inputs.pop("view", None)
        if view is not None:
            projected = self.captioner.model.multi_modal_projector(inputs.pop("image_tokens"))
            views = [token_view(tokens, *view) for tokens in projected]
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=views)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def token_view(tokens: torch.Tensor, grid: bool, extra: int) -> torch.Tensor:
    """
    A view of a picture's (N, width) tokens: the grid in its order if `grid`, then `extra` tokens drawn at random
    with replacement. Returns (N * grid + extra, width).
    """
    drawn = tokens[torch.randint(len(tokens), (extra,), device=tokens.device)]
    return torch.cat([tokens, drawn]) if grid else drawn
