"""Optimal transport whose weights cross-attention learns (DALI_OT^Att)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from dali_llava.train.losses.base import AlignmentLoss, LossOutput, uniform_weights
from dali_llava.train.losses.transport import mean_distance
from dali_llava.train.transport import check_solver, solve_transport


class AlignmentAttention(nn.Module):
    """Weighs each cloud's tokens by what the other cloud holds.

    ```
    audio x -> audio_query -.                       image y -> image_query -.
    image y -> image_key ----> audio_attention      audio x -> audio_key ----> image_attention
    image y -> image_value -'  -> mean over the     audio x -> audio_value -'  -> likewise -> b (B, Nv)
                                  width / temperature
                                  -> softmax over tokens -> a (B, Na)
    ```

    Args:
        width: D of the tokens.
        num_heads: heads of the two attentions; they share the width out.
        temperature: what the mean over the width is divided by.
    """

    def __init__(self, width: int, num_heads: int = 8, temperature: float = 20.0):
        super().__init__()
        if width < 1 or num_heads < 1 or width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, not {width} and {num_heads}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.temperature = temperature
        self.audio_query = nn.Linear(width, width)
        self.audio_key = nn.Linear(width, width)
        self.audio_value = nn.Linear(width, width)
        self.image_query = nn.Linear(width, width)
        self.image_key = nn.Linear(width, width)
        self.image_value = nn.Linear(width, width)
        self.audio_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.image_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights a (B, Na) and b (B, Nv) for audio (B, Na, D) and image tokens (B, Nv, D), each row summing to 1.

        Masks are (B, Na) and (B, Nv) bool, True for tokens that count; the others get weight 0 and are not looked at.
        """
        audio_hidden, _ = self.audio_attention(
            self.audio_query(audio),
            self.image_key(image),
            self.image_value(image),
            key_padding_mask=None if image_mask is None else ~image_mask,
            need_weights=False,
        )
        image_hidden, _ = self.image_attention(
            self.image_query(image),
            self.audio_key(audio),
            self.audio_value(audio),
            key_padding_mask=None if audio_mask is None else ~audio_mask,
            need_weights=False,
        )
        return self._token_weights(audio_hidden, audio_mask), self._token_weights(image_hidden, image_mask)

    def _token_weights(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = hidden.mean(dim=2) / self.temperature
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=1)


class AttentiveTransportLoss(AlignmentLoss):
    """Transport cost under learnt weights, and the learning of these weights, in one loss (DALI, stage 1b).

    The attention's weights are averaged with uniform ones, so that none falls below half of uniform. The loss is the
    mean over the batch of `OT(a, b) - lambda (H(a) + H(b))`, H being the entropy in nats. The attention reads detached
    tokens: one backward pass gives them the gradient of `OT(a, b)` at fixed weights, and the attention's parameters
    that of the whole.

    lambda counts in mean distances of the batch, all `|x_i - y_j|^2` averaged. In epoch 1 the weights are uniform and
    there is no entropy term; then lambda follows `entropy_schedule`. In eval mode the weights are uniform at any time,
    so that one epoch's validation loss can be held against another's.

    Args:
        width: D of the tokens, a multiple of `num_heads`.
        num_heads: heads of either attention.
        temperature: divides the scores before their softmax.
        entropy_schedule: relative lambda of epochs 2, 3, ...; the last one stays.
        solver: one of `solve_transport`'s.
        solver_options: passed on to it.

    Logs:
        transport_cost: mean `OT(a, b)`. mean_distance, max_gap: as in `TransportLoss`. lambda: in the cost's unit.
        entropy_audio, entropy_image: mean H in nats.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        temperature: float = 20.0,
        entropy_schedule: Sequence[float] = (0.25, 0.2, 0.15, 0.1, 0.05),
        solver: str = "exact",
        solver_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_solver(solver)
        if not entropy_schedule or not all(value >= 0 for value in entropy_schedule):
            raise ValueError(f"entropy_schedule must hold numbers of at least 0, not {entropy_schedule!r}")
        self.attention = AlignmentAttention(width, num_heads, temperature)
        self.entropy_schedule = tuple(entropy_schedule)
        self.solver = solver
        self.solver_options = solver_options or {}
        self.epoch = 1

    def set_epoch(self, epoch: int) -> None:
        """Tells which epoch runs, counted from 1."""
        if epoch < 1:
            raise ValueError(f"epochs count from 1; there is no epoch {epoch}")
        self.epoch = epoch

    @property
    def relative_lambda(self) -> float:
        """lambda of this epoch in mean distances; 0 in epoch 1."""
        if self.epoch == 1:
            return 0.0
        return self.entropy_schedule[min(self.epoch - 2, len(self.entropy_schedule) - 1)]

    def weights(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention's own weights (B, Na) and (B, Nv), before they meet the uniform ones (the paper's figure 7).

        No gradient runs to the tokens. Computed in float32 or better.
        """
        dtype = torch.promote_types(torch.promote_types(audio.dtype, image.dtype), torch.float32)
        tokens = (audio.detach().to(dtype), image.detach().to(dtype))
        with torch.autocast(audio.device.type, enabled=False):
            if all(parameter.dtype == dtype for parameter in self.attention.parameters()):
                return self.attention(*tokens, audio_mask, image_mask)
            # A trainer that casts whole modules has cast this one too.
            parameters = {name: parameter.to(dtype) for name, parameter in self.attention.named_parameters()}
            return functional_call(self.attention, parameters, (*tokens, audio_mask, image_mask))

    def compute(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> LossOutput:
        uniform = uniform_weights(audio, audio_mask), uniform_weights(image, image_mask)
        a, b = uniform
        if self.training and self.epoch > 1:
            learnt = self.weights(audio, image, audio_mask, image_mask)
            a, b = ((attended + even) / 2 for attended, even in zip(learnt, uniform, strict=True))
        result = solve_transport(audio, image, a, b, solver=self.solver, **self.solver_options)
        distance = mean_distance(audio, image, *uniform)
        entropy_a, entropy_b = (torch.special.entr(weights).sum(dim=1).mean() for weights in (a, b))
        cost = result.cost.mean()
        strength = self.relative_lambda * distance if self.training else torch.zeros_like(distance)
        loss = cost - strength * (entropy_a + entropy_b)
        if self.training and self.epoch == 1:
            # Zeros rather than no gradients: DistributedDataParallel waits for one from every parameter.
            loss = cost + sum(0.0 * parameter.sum() for parameter in self.attention.parameters())

        logs = {
            "transport_cost": cost,
            "mean_distance": distance,
            "max_gap": result.gap.max(),
            "lambda": strength,
            "entropy_audio": entropy_a,
            "entropy_image": entropy_b,
        }
        values = torch.stack([value.detach().double() for value in logs.values()])
        return LossOutput(loss, dict(zip(logs, values.tolist(), strict=True)))
