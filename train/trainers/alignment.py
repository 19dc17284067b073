"""Stage 1b: match the distribution of the audio tokens of a clip to that of its image tokens."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_optimizer import is_optimizer_factory

from dali_llava.modeling import LlavaAudioTowers
from dali_llava.train.arguments import COUPLED_ADAM
from dali_llava.train.base_model import train_only

from .distances import TokenDistances
from .stage import StageTrainer


@dataclass
class AlignmentOutput(ModelOutput):
    """Output of `AlignmentModel`: the `loss` to minimise and the objective's `logs`, or the tokens."""

    loss: torch.Tensor | None = None
    logs: dict | None = None
    audio_tokens: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    audio_mask: torch.Tensor | None = None


class AlignmentModel(nn.Module):
    """
    The two towers and an objective between their tokens.

    The objective is a submodule, so that its parameters (an attention, a temperature) are wrapped and gathered
    together with those of the audio tower. The vision tower runs without an autograd graph.

    Args:
        towers: the towers. All weights except those of the audio tower are frozen.
        objective: an `AlignmentLoss`.
        transport_micro_batches: number of parts of a batch, for a `TransportLoss`. The towers encode a part while the
            transport of the previous one is solved. The loss is that of the whole batch.
    """

    def __init__(self, towers: LlavaAudioTowers, objective: nn.Module, transport_micro_batches: int = 1):
        super().__init__()
        self.towers, self.objective, self.config = towers, objective, towers.config
        self.transport_micro_batches = transport_micro_batches
        train_only(towers, towers.audio_tower)

    def train(self, mode: bool = True):
        super().train(mode)
        self.towers.vision_tower.eval()  # frozen: no dropout
        return self

    def forward(
        self,
        pixel_values=None,
        input_features=None,
        input_features_mask=None,
        image_tokens=None,
        return_tokens: bool = False,
    ) -> AlignmentOutput:
        """
        Compute the objective of a batch.

        Args:
            pixel_values: (B, 3, H, W); not used if `image_tokens` is given.
            input_features: (B, frames, mels).
            input_features_mask: (B, frames), True for frames that count; all by default.
            image_tokens: (B, N, width), output of the vision tower.
            return_tokens: whether to return `audio_tokens` (B, Na, width), `image_tokens` (B, N, width) and
                `audio_mask` (B, Na) in place of the loss.
        """
        batch = (pixel_values, input_features, input_features_mask, image_tokens)
        if return_tokens:
            audio_tokens, image_tokens, audio_mask = self.encode(*batch)
            return AlignmentOutput(audio_tokens=audio_tokens, image_tokens=image_tokens, audio_mask=audio_mask)
        if self.transport_micro_batches == 1:
            output = self.objective(*self.encode(*batch))
        else:
            output = self.objective.over_micro_batches(
                self.encode(*part) for part in _micro_batches(batch, self.transport_micro_batches)
            )
        return AlignmentOutput(loss=output.loss, logs=output.logs)

    def encode(
        self, pixel_values, input_features, input_features_mask, image_tokens
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Audio tokens (B, Na, width), image tokens (B, N, width) and audio mask (B, Na) of arguments of `forward`."""
        towers = self.towers
        if image_tokens is None:
            with torch.no_grad():
                image_tokens = towers.encode_image(pixel_values)
        audio_tokens = towers.encode_audio(input_features, input_features_mask)
        audio_mask = None if input_features_mask is None else towers.audio_tower.token_mask(input_features_mask)
        return audio_tokens, image_tokens, audio_mask


def _micro_batches(batch: tuple[torch.Tensor | None, ...], count: int) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Up to `count` parts of tensors (B, ...), of equal size except for the last one. None stays None."""
    return zip(*(itertools.repeat(None) if part is None else part.chunk(count) for part in batch), strict=False)


class ScheduleEpochs(TrainerCallback):
    """
    Calls `objective.set_epoch`, counted from 1, before each step (for the entropy weight of `AttentiveTransportLoss`).

    Args:
        objective: the objective.
        epochs: number of epochs to divide a run of `max_steps` into; by default the epochs of the data.
    """

    def __init__(self, objective: nn.Module, epochs: int | None = None):
        self.objective, self.epochs = objective, epochs

    def on_step_begin(self, args, state, control, **kwargs):
        if self.epochs is not None:
            self.objective.set_epoch(1 + self.epochs * state.global_step // state.max_steps)
        else:
            self.objective.set_epoch(1 + int(state.epoch or 0))


class AlignmentTrainer(StageTrainer):
    """
    Trainer of an `AlignmentModel`. The objective's parameters, if any, are a group of the same optimizer.
    They are saved in the stage's folder; see `write_objective`.

    Args:
        model: the towers and the objective.
        kwargs: arguments of `StageTrainer`.
    """

    def __init__(self, model: AlignmentModel, **kwargs):
        super().__init__(model=model, pretrained=model.towers, **kwargs)
        if hasattr(model.objective, "set_epoch"):
            self.add_callback(ScheduleEpochs(model.objective, self.args.schedule_epochs))
        if self.args.distance_steps:
            self.add_callback(TokenDistances(self, self.args.distance_steps))
        self.loss_is_scaled_for_ga = False  # a mean over the pairs of a batch, not a sum over tokens

    def create_optimizer(self, model=None):
        """
        Create the optimizer `args.optim` for the audio tower and for the objective's parameters, if it has any.

        Raises:
            ValueError: if the optimizer creates its own parameter groups.
        """
        if self.optimizer is None:
            args, module = self.args, self.model
            groups = [
                {
                    "params": [p for p in module.towers.parameters() if p.requires_grad],
                    "weight_decay": args.weight_decay,
                }
            ]
            own = list(module.objective.parameters())
            if own:
                # No decay: with no other gradient, Adam would move the weights to zero at full speed.
                rate = args.objective_learning_rate
                groups.append({"params": own, "lr": rate, "weight_decay": 0.0, "constant_rate": True})
            optimizer_class, options = self._optimizer_class()
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _optimizer_class(self) -> tuple[type[torch.optim.Optimizer], dict]:
        args = self.args
        if args.optim == COUPLED_ADAM:
            options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "fused": True}
            return torch.optim.Adam, {"lr": args.learning_rate, **options}
        found, options = self.get_optimizer_cls_and_kwargs(args, self.model)
        if is_optimizer_factory(found) or options.keys() & {"params", "model", "optimizer_dict"}:
            raise ValueError(
                f"optim: {args.optim.value} creates its own parameter groups, so the objective cannot have one; use "
                f"{COUPLED_ADAM}, adamw_torch or another optimizer without layer-wise groups."
            )
        return found, options

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            if self.args.halve_every:
                tower = self._halved(num_training_steps)
            else:
                tower = super().create_scheduler(num_training_steps, optimizer).lr_lambdas[0]
            constant = [group.get("constant_rate", False) for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, [(lambda step: 1.0) if each else tower for each in constant])
        return self.lr_scheduler

    def _halved(self, num_training_steps: int) -> Callable[[int], float]:
        """Return the rate's factor by step, halved at epoch `halve_from` and every `halve_every` epochs after it."""
        args = self.args
        if args.max_steps > 0:  # num_train_epochs is then unused
            batches = max(1, len(self.get_train_dataloader()))
            steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        else:
            steps_per_epoch = max(1, num_training_steps / args.num_train_epochs)

        def factor(step: int) -> float:
            epochs = step / steps_per_epoch - args.halve_from
            return 1.0 if epochs < 0 else 0.5 ** (1 + epochs // args.halve_every)

        return factor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        if model.training:
            self.monitor.add(output.logs, scale=1 / self.current_gradient_accumulation_steps)
        return (output.loss, output) if return_outputs else output.loss
