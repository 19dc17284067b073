"""Next-token training of captions: the captioner itself, the prefix, the audio projector."""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .stage import StageTrainer


class CaptioningTrainer(StageTrainer):
    """Negative log-likelihood of the answers, with what the collator gives (DALI, stages 1a and 2)."""

    def __init__(self, model, **kwargs):
        super().__init__(model=model, captioner=model, **kwargs)


STRAYS = 0.4  # largest share of a picture's drawn tokens that come from other pictures


class TokenViewTrainer(CaptioningTrainer):
    """
    Captioning from views of a picture's tokens, so that the captioner reads any set of them, not one fixed grid.

    Audio tokens are another number of tokens in another order, and sound with picture is two sets at once; what a
    sound leaves open, they spread over several pictures. A captioner that has only seen one grid in one order cannot
    read that, however well they are aligned. The collator chooses the view and writes its placeholders; this trainer
    fills them.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        view = inputs.pop("view", None)
        if view is not None:
            views = self.captioner.model.multi_modal_projector(token_views(inputs.pop("image_tokens"), *view))
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(views))}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def token_views(tokens: torch.Tensor, grid: bool, extra: int, strays: float = STRAYS) -> torch.Tensor:
    """
    A view of each picture: its grid in its order if `grid`, then `extra` tokens drawn at random with replacement.

    Args:
        tokens: (B, N, width).
        strays: of the drawn tokens a share uniform in [0, strays], another one a picture, is from the whole batch.

    Returns:
        (B, N * grid + extra, width).
    """
    pictures, count, width = tokens.shape
    own = torch.arange(pictures)[:, None].expand(pictures, extra)
    stray = torch.rand(pictures, extra) < strays * torch.rand(pictures, 1)
    picture = torch.where(stray, torch.randint(pictures, (pictures, extra)), own)
    drawn = tokens[picture, torch.randint(count, (pictures, extra))]
    return torch.cat([tokens, drawn], dim=1) if grid else drawn
