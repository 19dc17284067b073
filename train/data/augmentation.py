"""Augmentation of spectrograms in training: DALI's own, and stronger augmentation for small sets of recordings."""

import math
from dataclasses import dataclass

import torch


def augment_spectrograms(features: torch.Tensor, noise: float = 0.1, roll: int | None = None) -> torch.Tensor:
    """
    Augment normalised spectrograms with noise and rolling, as in the reference implementation of DALI.

    Args:
        features: (B, frames, mels).
        noise: maximum amplitude. Uniform noise in [0, a) is added to each clip, with a drawn from U(0, noise).
        roll: maximum number of frames by which each clip is rolled in time, padding included; by default all frames.

    Returns:
        (B, frames, mels), a new tensor.
    """
    batch, frames, _ = features.shape
    roll = frames if roll is None else roll
    amplitude = noise * torch.rand(batch, 1, 1)
    shift = torch.randint(-roll, roll + 1, (batch, 1))
    index = (torch.arange(frames) - shift) % frames
    rolled = features.gather(1, index.unsqueeze(-1).expand_as(features))
    return rolled + amplitude * torch.rand_like(rolled)


def equalise_spectrograms(features: torch.Tensor, strength: float, knots: int = 5) -> torch.Tensor:
    """
    Apply a random gain per mel bin, which simulates another microphone or room.

    The gains interpolate smoothly between `knots` normal deviates and are the same in all frames of a clip.

    Args:
        features: (B, frames, mels), normalised log powers.
        strength: standard deviation of the gains, in the unit of the features.
        knots: number of knots, at least 2, evenly spaced from the first to the last mel bin.

    Returns:
        (B, frames, mels), a new tensor.
    """
    batch, _, mels = features.shape
    gains = strength * torch.randn(batch, knots)
    position = torch.linspace(0, knots - 1, mels)
    left = position.long().clamp(max=knots - 2)
    share = (1 - torch.cos(torch.pi * (position - left))) / 2
    return features + (gains[:, left] * (1 - share) + gains[:, left + 1] * share)[:, None]


def mix_spectrograms(features: torch.Tensor, share: float, unit: float = 1.0, faintest: float = -12.0) -> torch.Tensor:
    """
    Mix clips of a batch by adding their powers.

    Args:
        features: (B, frames, mels), log powers, shifted and divided by `unit`.
        share: probability that another clip is added to a clip.
        unit: one unit of the features in nats, which is the standard deviation used for normalisation.
        faintest: lowest level of the added clip in dB. The level is drawn from U(faintest, 0).

    Returns:
        (B, frames, mels), a new tensor.
    """
    batch = len(features)
    level = faintest * torch.rand(batch, 1, 1) * math.log(10) / 10
    others = features[torch.randperm(batch)]
    mixed = torch.logaddexp(unit * features, unit * others + level) / unit
    return torch.where(torch.rand(batch, 1, 1) < share, mixed, features)


@dataclass(frozen=True)
class Augmentation:
    """
    Augmentation of normalised spectrograms (B, frames, mels): mixing, equalising, rolling and noise, in this order.

    Mixing and equalising draw random numbers only if they are enabled.

    Args:
        noise: `noise` of `augment_spectrograms`; 0 adds no noise.
        roll: `roll` of `augment_spectrograms`; 0 disables rolling.
        equaliser: `strength` of `equalise_spectrograms`; 0 disables it.
        mix: `share` of `mix_spectrograms`; 0 disables it.
        unit: `unit` of `mix_spectrograms`.
    """

    noise: float = 0.1
    roll: int | None = None
    equaliser: float = 0.0
    mix: float = 0.0
    unit: float = 1.0

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        if self.mix:
            features = mix_spectrograms(features, self.mix, self.unit)
        if self.equaliser:
            features = equalise_spectrograms(features, self.equaliser)
        return augment_spectrograms(features, self.noise, self.roll)


UNCHANGED = Augmentation(noise=0.0, roll=0)
