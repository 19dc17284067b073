"""Optimal transport with weights from a learned cross-attention (DALI_OT^Att)."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from dali_llava.atomic import atomic_path
from dali_llava.train.losses.base import uniform_weights
from dali_llava.train.losses.transport import PosedPairs, TransportLoss, pair_distances


ATTENTION_WEIGHTS = "alignment_attention.safetensors"


class AlignmentAttention(nn.Module):
    """Cross-attention that weights the tokens of each set by the tokens of the other set.

    ```
    audio x -> audio_query -.                       image y -> image_query -.
    image y -> image_key ----> audio_attention      audio x -> audio_key ----> image_attention
    image y -> image_value -'  -> mean over the     audio x -> audio_value -'  -> the same -> b (B, Nv)
                                  width / temperature
                                  -> softmax over tokens -> a (B, Na)
    ```

    Args:
        width: D of the tokens.
        num_heads: number of heads of each attention; divides the width.
        temperature: divides the mean over the width.
    """

    def __init__(self, width: int, num_heads: int = 8, temperature: float = 20.0):
        super().__init__()
        if width < 1 or num_heads < 1 or width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, not {width} and {num_heads}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.num_heads, self.temperature = num_heads, temperature
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

        Masks are (B, Na) and (B, Nv) bool, True for tokens that count. Other tokens are ignored and get weight 0. The
        attention computes in the dtype of its parameters, the softmax in float32 or better.
        """
        # Tokens are cast, not parameters: an engine that shards the parameters gathers them inside the modules.
        dtype = next(self.parameters()).dtype
        audio, image = audio.to(dtype), image.to(dtype)
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

    @torch.no_grad()
    def image_map(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Weights of the image tokens on the grid of their picture (figure 7 of the paper), before they are mixed.

        Args:
            audio: (B, Na, D) tokens.
            image: (B, Nv, D) tokens, row by row.
            audio_mask: (B, Na) bool, True for tokens that count.
            grid: rows and columns of tokens; a square by default.

        Returns:
            (B, rows, columns) weights; 1 is the uniform weight.

        Raises:
            ValueError: the tokens do not fill the grid.
        """
        count = image.shape[1]
        if grid is None:
            grid = (math.isqrt(count),) * 2
        if math.prod(grid) != count:
            raise ValueError(
                f"{count} image tokens do not fill a grid of {grid[0]} x {grid[1]}; give its rows and columns"
            )
        _, weights = self(audio, image, audio_mask)
        return weights.unflatten(1, grid) * count

    def _token_weights(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scores = hidden.mean(dim=2, dtype=dtype) / self.temperature
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=1)


def save_alignment_attention(
    attention: AlignmentAttention, folder: str | os.PathLike, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """
    Write the weights, the number of heads and the temperature into `folder`; see `load_alignment_attention`.

    Args:
        attention: the attention.
        folder: folder to write to. It is created.
        weights: the whole weights by name, if the parameters of `attention` are sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = attention.state_dict() if weights is None else weights
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    options = {name: json.dumps(getattr(attention, name)) for name in ("num_heads", "temperature")}
    with atomic_path(folder / ATTENTION_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **options})


def load_alignment_attention(folder: str | os.PathLike) -> AlignmentAttention:
    """
    The attention that an alignment with `ot_att` trained, from the folder of its stage, on the CPU.

    Raises:
        FileNotFoundError: the folder has no attention.
        ValueError: the file is damaged or holds other tensors.
    """
    path = Path(folder) / ATTENTION_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an alignment with objective ot_att writes it.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or save it again.") from error
    try:
        options = {name: json.loads(metadata[name]) for name in ("num_heads", "temperature")}
        with torch.device("meta"):  # allocates nothing and draws nothing
            attention = AlignmentAttention(len(tensors["audio_query.bias"]), **options)
        attention.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold an alignment's attention: {' '.join(str(error).split())}.") from error
    return attention


class AttentiveTransportLoss(TransportLoss):
    """Transport cost with weights from a cross-attention that the same loss trains [1, equation 5].

    The loss is the mean over the batch of `OT(a, b) - lambda (H(a) + H(b))`, where H is the entropy in nats. The
    weights a and b are the mean of the attention's weights and uniform weights, so each is at least half of uniform.
    The attention reads detached tokens: one backward pass gives the tokens the gradient of `OT(a, b)` at fixed
    weights, and the attention's parameters the gradient of the loss.

    lambda is relative to the mean of all `|x_i - y_j|^2` of the batch. In epoch 1 the weights are uniform and there is
    no entropy term: the attention runs, but its output counts for nothing, so that its gradient is zero. Then lambda
    follows `entropy_schedule`. In evaluation mode the weights are always uniform, so the validation losses of
    different epochs are comparable.

    With `torch.distributed`, lambda is relative to the mean over all ranks, which must hold the same number of pairs.
    The mean of the ranks' losses, with gradients averaged by DistributedDataParallel, is then the loss of the whole
    batch.

    Args:
        width: D of the tokens, a multiple of `num_heads`.
        num_heads: number of heads of each attention.
        temperature: divides the scores before the softmax.
        entropy_schedule: relative lambda of epochs 2, 3, ...; the last value applies to all later epochs.
        solver, solver_options: as in `TransportLoss`.

    Logs:
        transport_cost: mean `OT(a, b)`. mean_distance, max_gap: as in `TransportLoss`. lambda: in the unit of the
        cost. entropy_audio, entropy_image: mean H in nats. transport_seconds: as in `TransportLoss`. All but lambda
        are of this rank.

    References:
        [1] H. Malard et al., "An Eye for an Ear: Zero-shot Audio Description Leveraging an Image Captioner using
        Audiovisual Distribution Alignment", 2024.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> loss = AttentiveTransportLoss(width=4, num_heads=2)
        >>> audio, image = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
        >>> first = loss(audio, image).logs
        >>> loss.set_epoch(2)
        >>> second = loss(audio, image).logs
        >>> first["lambda"], round(second["lambda"] / second["mean_distance"], 6)
        (0.0, 0.25)
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
        super().__init__(solver, solver_options)
        if not entropy_schedule or not all(value >= 0 for value in entropy_schedule):
            raise ValueError(f"entropy_schedule must hold numbers of at least 0, not {entropy_schedule!r}")
        self.attention = AlignmentAttention(width, num_heads, temperature)
        self.entropy_schedule = tuple(entropy_schedule)
        self.epoch = 1

    @classmethod
    def from_captioner(cls, captioner: PreTrainedModel, **options: Any) -> "AttentiveTransportLoss":
        """Builds the loss with an attention as wide as the captioner's tokens; see `AlignmentLoss.from_captioner`."""
        return cls(**{"width": captioner.config.audio_config.output_size, **options})

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 1."""
        if epoch < 1:
            raise ValueError(f"epochs are counted from 1; there is no epoch {epoch}")
        self.epoch = epoch

    @property
    def relative_lambda(self) -> float:
        """lambda of this epoch relative to the mean distance; 0 in epoch 1."""
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
        """The attention's weights (B, Na) and (B, Nv), before they are averaged with uniform weights.

        The tokens get no gradient.
        """
        with torch.autocast(audio.device.type, enabled=False):
            return self.attention(audio.detach(), image.detach(), audio_mask, image_mask)

    def pose(
        self,
        audio: torch.Tensor,
        image: torch.Tensor,
        audio_mask: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> PosedPairs:
        uniform = uniform_weights(audio, audio_mask), uniform_weights(image, image_mask)
        a, b = uniform
        if self.training:
            # The attention also runs where its share is 0: data-parallel engines wait for a gradient of every
            # parameter, and ZeRO-3 has one only for the modules that run.
            share = 0.5 if self.epoch > 1 else 0.0
            learnt = self.weights(audio, image, audio_mask, image_mask)
            if not share:
                learnt = tuple(attended.nan_to_num() for attended in learnt)  # 0 times NaN is NaN
            a, b = (share * attended + (1 - share) * even for attended, even in zip(learnt, uniform, strict=True))
        terms = {
            "mean_distance": pair_distances(audio, image, *uniform),
            "entropy_audio": _entropies(a, audio_mask),
            "entropy_image": _entropies(b, image_mask),
        }
        return PosedPairs(self.problem(audio, image, a, b), terms)

    def combine(self, cost: torch.Tensor, terms: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        distance = terms["mean_distance"]
        strength = self.relative_lambda * _mean_over_ranks(distance) if self.training else torch.zeros_like(distance)
        loss = cost - strength * (terms["entropy_audio"] + terms["entropy_image"])
        return loss, {"lambda": strength}


def _entropies(weights: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B,) H, in nats, of weights (B, N), which are 0 where the mask is False."""
    if mask is not None:  # 1 has no entropy either, and 0 has an infinite slope
        weights = weights.masked_fill(~mask, 1.0)
    return torch.special.entr(weights).sum(dim=1)


def _mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a scalar without gradient over all ranks; the scalar itself where there is one."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
