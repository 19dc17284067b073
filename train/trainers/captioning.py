"""Next-token training of captions: the captioner itself, the prefix, the audio projector."""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .stage import StageTrainer


class CaptioningTrainer(StageTrainer):
    """Negative log-likelihood of the answers, with what the collator gives (DALI, stages 1a and 2)."""

    def __init__(self, model, **kwargs):
        super().__init__(model=model, captioner=model, **kwargs)


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
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        view = inputs.pop("view", None)
        if view is not None:
            views = token_views(inputs.pop("image_tokens"), *view)
            projected = self.captioner.model.multi_modal_projector(torch.cat(views))
            tokens = list(projected.split([len(view) for view in views]))
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


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
