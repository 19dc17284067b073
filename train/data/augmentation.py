"""Augmentation of spectrograms in training: DALI's own, and stronger augmentation for small sets of recordings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


Generators = Sequence[np.random.Generator]


def augment_spectrograms(
    features: torch.Tensor, generators: Generators, noise: float = 0.1, roll: int | None = None
) -> torch.Tensor:
    """
    Augment normalised spectrograms with noise and rolling, as in the reference implementation of DALI.

    Args:
        features: (B, frames, mels).
        generators: random generators of the clips.
        noise: maximum amplitude. Uniform noise in [0, a) is added to each clip, with a drawn from U(0, noise).
        roll: maximum number of frames by which each clip is rolled in time, padding included; by default all frames.

    Returns:
        (B, frames, mels), a new tensor.
    """
    roll = features.shape[1] if roll is None else roll
    augmented = torch.empty_like(features)
    for clip, target, generator in zip(features, augmented, generators, strict=True):
        target.copy_(clip.roll(int(generator.integers(-roll, roll + 1)), dims=0))
        if noise:
            amplitude = noise * generator.random()
            target.add_(torch.from_numpy(generator.random(clip.shape, dtype=np.float32)), alpha=amplitude)
    return augmented


def equalise_spectrograms(
    features: torch.Tensor, generators: Generators, strength: float, knots: int = 5
) -> torch.Tensor:
    """
    Apply a random gain per mel bin, which simulates another microphone or room.

    The gains interpolate smoothly between `knots` normal deviates and are the same in all frames of a clip.

    Args:
        features: (B, frames, mels), normalised log powers.
        generators: random generators of the clips.
        strength: standard deviation of the gains, in the unit of the features.
        knots: number of knots, at least 2, evenly spaced from the first to the last mel bin.

    Returns:
        (B, frames, mels), a new tensor.
    """
    mels = features.shape[-1]
    deviates = [generator.standard_normal(knots, dtype=np.float32) for generator in generators]
    gains = strength * torch.from_numpy(np.stack(deviates))
    position = torch.linspace(0, knots - 1, mels)
    left = position.long().clamp(max=knots - 2)
    share = (1 - torch.cos(torch.pi * (position - left))) / 2
    return features + (gains[:, left] * (1 - share) + gains[:, left + 1] * share)[:, None]


def mask_spectrograms(
    features: torch.Tensor, generators: Generators, mels: int, frames: int, value: float = 0.0
) -> torch.Tensor:
    """
    Mask a band of mel bins and a span of frames, as SpecAugment (Park et al., 2019, arXiv:1904.08779) does.

    All widths below the limit, and all places of a mask, are equally likely.

    Args:
        features: (B, frames, mels).
        generators: random generators of the clips.
        mels: limit of the width of the band, at most the number of mel bins.
        frames: limit of the length of the span, at most the number of frames.
        value: value of the masked cells.

    Returns:
        (B, frames, mels), a new tensor.

    Raises:
        ValueError: a mask can be wider than the spectrograms.
    """
    masked = features.clone()
    for axis, name, limit in ((1, "frames", frames), (2, "mel bins", mels)):
        size = features.shape[axis]
        if limit > size:
            raise ValueError(f"masks of up to {limit} {name} do not fit spectrograms of {size} {name}.")
        for clip, generator in zip(masked, generators, strict=True):
            width = int(generator.integers(max(limit, 1)))
            start = int(generator.integers(size - width + 1))
            clip.narrow(axis - 1, start, width).fill_(value)
    return masked


def mix_spectrograms(
    features: torch.Tensor, generators: Generators, share: float, unit: float = 1.0, faintest: float = -12.0
) -> torch.Tensor:
    """
    Mix clips of a batch by adding their powers.

    The clips are ordered at random, and each clip is added to the one before it, the first to the last. The other clip
    depends on the clips of the batch, but not on their order.

    Args:
        features: (B, frames, mels), log powers, shifted and divided by `unit`.
        generators: random generators of the clips.
        share: probability that another clip is added to a clip.
        unit: one unit of the features in nats, which is the standard deviation used for normalisation.
        faintest: lowest level of the added clip in dB. The level is drawn from U(faintest, 0).

    Returns:
        (B, frames, mels), a new tensor.
    """
    draws = np.stack([generator.random(3, dtype=np.float32) for generator in generators], axis=1)
    place, level, chance = torch.from_numpy(draws)
    order = place.argsort()
    others = torch.empty_like(order)
    others[order] = order.roll(-1)
    level = faintest * level[:, None, None] * math.log(10) / 10
    mixed = torch.logaddexp(unit * features, unit * features[others] + level) / unit
    return torch.where(chance[:, None, None] < share, mixed, features)


@dataclass(frozen=True)
class Augmentation:
    """
    Augmentation of normalised spectrograms (B, frames, mels): mixing, equalising, masking, rolling and noise, in this
    order.

    Except for mixing, the augmentation of a clip depends on its own generator only.

    Args:
        noise: `noise` of `augment_spectrograms`; 0 adds no noise.
        roll: `roll` of `augment_spectrograms`; 0 disables rolling.
        equaliser: `strength` of `equalise_spectrograms`; 0 disables it.
        mix: `share` of `mix_spectrograms`; 0 disables it.
        unit: `unit` of `mix_spectrograms`.
        mask_mels, mask_frames: `mels` and `frames` of `mask_spectrograms`; 0 disables each. LAVCap uses 48 and 192.
        mask_value: `value` of `mask_spectrograms`. LAVCap masks before normalisation, so its value is `-mean / std`.
    """

    noise: float = 0.1
    roll: int | None = None
    equaliser: float = 0.0
    mix: float = 0.0
    unit: float = 1.0
    mask_mels: int = 0
    mask_frames: int = 0
    mask_value: float = 0.0

    def __call__(self, features: torch.Tensor, generators: Generators) -> torch.Tensor:
        """Augment clips (B, frames, mels) with the random `generators` of the clips."""
        if self.mix:
            features = mix_spectrograms(features, generators, self.mix, self.unit)
        if self.equaliser:
            features = equalise_spectrograms(features, generators, self.equaliser)
        if self.mask_mels or self.mask_frames:
            features = mask_spectrograms(features, generators, self.mask_mels, self.mask_frames, self.mask_value)
        return augment_spectrograms(features, generators, self.noise, self.roll)


UNCHANGED = Augmentation(noise=0.0, roll=0)
