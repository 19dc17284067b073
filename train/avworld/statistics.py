"""Statistics of a spectrogram, which an audio tower can learn to tell: self-supervision without masks or labels."""

import torch
from scipy.fft import dct
from torch import nn


def spectral_statistics(
    features: torch.Tensor, coefficients: int = 24, bands: int = 8, depth: float = 5.0
) -> torch.Tensor:
    """
    What classical descriptors keep of a sound: its mean spectrum, how it varies, and how fast.

    Of the first cepstral `coefficients` of the frames (orthonormal DCT-II over the mel bins): mean, standard deviation
    and mean absolute difference of every second frame over time. Of the mean logarithm in each of `bands` groups of
    mel bins: log(1 + magnitude) of its spectrum over time, averaged within octaves of modulation frequency, from one
    cycle a clip on.

    Args:
        features: (B, frames, mels), normalised logarithms; mels a multiple of `bands`.
        depth: what lies further than this below a clip's loudest bin is raised to there, lest digital silence weigh
            more than sound.

    Returns:
        (B, 3 * coefficients + octaves * bands) float32; octaves = floor(log2(frames / 2)).

    Raises:
        ValueError: when there are fewer mel bins than coefficients, or they do not fill the bands.
    """
    features = features.float()
    frames, mels = features.shape[1:]
    if mels < coefficients or mels % bands:
        raise ValueError(f"{mels} mel bins: need at least {coefficients}, and a multiple of {bands}.")
    features = features.maximum(features.amax((1, 2), keepdim=True) - depth)
    basis = torch.from_numpy(dct(torch.eye(mels).double().numpy(), norm="ortho")[:, :coefficients]).to(features)
    cepstrum = features @ basis
    change = (cepstrum[:, 2:] - cepstrum[:, :-2]).abs().mean(1)
    levels = features.unflatten(2, (bands, -1)).mean(3)
    spectrum = torch.fft.rfft(levels - levels.mean(1, keepdim=True), dim=1).abs()
    edges = [2**octave for octave in range((frames // 2).bit_length())]
    octaves = [spectrum[:, low:high].mean(1) for low, high in zip(edges, edges[1:], strict=False)]
    modulation = torch.stack(octaves, dim=1).log1p().flatten(1)
    return torch.cat([cepstrum.mean(1), cepstrum.std(1), change, modulation], dim=1)


class StatisticsLoss(nn.Module):
    """
    Mean squared error with which the mean of a clip's audio tokens tells the clip's statistics, each standardised.

    A regression of hand-made descriptors by linear workers, as in PASE (Pascual et al., 2019, section 2.2); the worker
    is thrown away. 1.0 is what the corpus's mean would have.

    Args:
        width: of an audio token.
        examples: (n, frames, mels), augmented spectrograms, which give the statistics' means and deviations.

    Raises:
        ValueError: fewer than 2 examples, or as `spectral_statistics`.
    """

    def __init__(self, width: int, examples: torch.Tensor):
        super().__init__()
        if len(examples) < 2:
            raise ValueError(f"statistics of {len(examples)} clip have no deviation; bring at least 2.")
        statistics = spectral_statistics(examples)
        self.register_buffer("mean", statistics.mean(0))
        self.register_buffer("deviation", statistics.std(0).clamp_min(1e-6))
        self.worker = nn.Linear(width, statistics.shape[1])

    def forward(self, audio_tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            audio_tokens: (B, N, width), of the very `features` (B, frames, mels) that the tower was given.
        """
        with torch.autocast(features.device.type, enabled=False):
            told = self.worker(audio_tokens.float().mean(1))
            return nn.functional.mse_loss(told, (spectral_statistics(features) - self.mean) / self.deviation)
