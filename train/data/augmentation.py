"""Random changes of spectrograms in training: DALI's own, and those that make the most of a few recordings."""

import math
from dataclasses import dataclass

import torch


def augment_spectrograms(features: torch.Tensor, noise: float = 0.1, roll: int | None = None) -> torch.Tensor:
    """
    DALI's training augmentation of normalised spectrograms (reference implementation).

    Args:
        features: (B, frames, mels).
        noise: each clip gets non-negative uniform noise of an amplitude drawn from U(0, noise).
        roll: each clip is rolled in time, padding included, by up to this many frames; all of them by default.

    Returns:
        (B, frames, mels), new memory.
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
    A random gain at every mel bin, as of another microphone or room: `knots` normal deviates, smoothly joined.

    Args:
        features: (B, frames, mels), normalised logarithms.
        strength: standard deviation of the deviates, in the features' unit.
        knots: evenly spread over the mel bins, the first and the last bin included; at least 2.

    Returns:
        (B, frames, mels), new memory; the gain of a clip is the same in all its frames.
    """
    batch, _, mels = features.shape
    gains = strength * torch.randn(batch, knots)
    position = torch.linspace(0, knots - 1, mels)
    left = position.long().clamp(max=knots - 2)
    share = (1 - torch.cos(torch.pi * (position - left))) / 2
    return features + (gains[:, left] * (1 - share) + gains[:, left + 1] * share)[:, None]


def mix_spectrograms(features: torch.Tensor, share: float, unit: float = 1.0, faintest: float = -12.0) -> torch.Tensor:
    """
    Sounds on top of each other: the powers of some clips and of others of the batch add up.

    Args:
        features: (B, frames, mels), logarithms of powers, shifted and divided by `unit`.
        share: probability with which another clip is laid over a clip.
        unit: nats in one unit of the features: the standard deviation by which they were normalised.
        faintest: level of the other clip, drawn from U(faintest, 0), in dB.

    Returns:
        (B, frames, mels), new memory.
    """
    batch = len(features)
    level = faintest * torch.rand(batch, 1, 1) * math.log(10) / 10
    others = features[torch.randperm(batch)]
    mixed = torch.logaddexp(unit * features, unit * others + level) / unit
    return torch.where(torch.rand(batch, 1, 1) < share, mixed, features)


@dataclass(frozen=True)
class Augmentation:
    """
    Normalised spectrograms (B, frames, mels) as they are trained on: mixed, equalised, rolled, with noise.

    What is switched off draws no random number.

    Args:
        noise, roll: see `augment_spectrograms`; with 0 and 0 it leaves the spectrogram as it is.
        equaliser: strength of `equalise_spectrograms`.
        mix, unit: share and unit of `mix_spectrograms`.
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
