"""The distance between the audio and the image tokens of a fixed batch, measured during the alignment."""

import logging
from itertools import islice

import ot
import torch
from transformers import Trainer

from dali_llava.processing.media import MediaError
from dali_llava.train.data.augmentation import UNCHANGED
from dali_llava.train.data.collators import AlignmentCollator
from dali_llava.train.losses.mmd import MMDLoss

from .monitoring import PeriodicCallback


logger = logging.getLogger(__name__)

CLIPS = 16  # first clips of the evaluation dataset, or of the training dataset without one
PROJECTIONS = 128  # of the sliced Wasserstein distance


class TokenDistances(PeriodicCallback):
    """
    Logs `token_distances` of the first clips of the evaluation dataset, or of the training dataset without one.

    The clips are not augmented and show the frame `frame` of the collator, or the first one. Clips that cannot be
    opened are left out.

    Args:
        trainer: trainer of an `AlignmentModel`, with an `AlignmentCollator`.
        steps: number of steps between two measurements.
    """

    def __init__(self, trainer: Trainer, steps: int):
        super().__init__(steps)
        self.trainer = trainer
        self._batch = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._batch = self._fixed_batch()
        if self._batch is not None:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self._batch is not None:
            super().on_step_end(args, state, control, **kwargs)

    def _fixed_batch(self) -> dict[str, torch.Tensor] | None:
        trainer = self.trainer
        rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        collator = AlignmentCollator(trainer.data_collator.processor, UNCHANGED, trainer.data_collator.frame or 0)
        batches = []
        for row in islice(rows, CLIPS):
            try:
                batches.append(collator([row]))
            except MediaError as error:
                logger.warning("%s; the clip is left out of the token distances", error)
        if not batches:
            logger.warning("none of the first %d clips can be opened; token distances are not logged", CLIPS)
            return None
        names = [name for name, value in batches[0].items() if torch.is_tensor(value)]
        return {name: torch.cat([batch[name] for batch in batches]) for name in names}

    @torch.no_grad()
    def measure(self, state, control) -> None:
        trainer = self.trainer
        model = trainer.model_wrapped  # the engine, which gathers partitioned weights
        model.eval()
        output = model(**trainer._prepare_inputs(dict(self._batch)), return_tokens=True)
        model.train()
        found = token_distances(output.audio_tokens, output.image_tokens, output.audio_mask)
        if state.global_step == 0:
            trainer.log(found)
        else:
            trainer.monitor.note(found)
            control.should_log = True


def token_distances(
    audio: torch.Tensor, image: torch.Tensor, audio_mask: torch.Tensor | None = None
) -> dict[str, float]:
    """
    Two distances between the audio and the image tokens of each clip, averaged over the clips.

    Args:
        audio: (B, Na, D) tokens.
        image: (B, Nv, D) tokens.
        audio_mask: (B, Na) bool, True for tokens that count; all by default.

    Returns:
        `token_mmd`, the squared maximum mean discrepancy of `MMDLoss`, and `token_sliced_wasserstein`, the sliced
        2-Wasserstein distance [1] over 128 random projections, which are the same in each call.

    References:
        [1] N. Bonneel, J. Rabin, G. Peyré, H. Pfister, "Sliced and Radon Wasserstein Barycenters of Measures", 2015.
    """
    audio, image = audio.float(), image.float()
    masks = torch.ones(audio.shape[:2], dtype=torch.bool, device=audio.device) if audio_mask is None else audio_mask
    sliced = [
        ot.sliced_wasserstein_distance(x[mask], y, n_projections=PROJECTIONS, seed=0)
        for x, y, mask in zip(audio, image, masks, strict=True)
    ]
    return {
        "token_mmd": MMDLoss()(audio, image, audio_mask).loss.item(),
        "token_sliced_wasserstein": torch.stack(sliced).mean().item(),
    }
