"""Statistics of spectrograms as targets of self-supervised training, without masks or labels."""

import torch
from scipy.fft import dct
from torch import nn


@torch.compiler.disable  # inductor expects another memory layout of the Fourier transform
def spectral_statistics(
    features: torch.Tensor, coefficients: int = 24, bands: int = 8, depth: float = 5.0
) -> torch.Tensor:
    """
    Compute classical descriptors of sounds: the mean spectrum, how it varies, and how fast.

    The first `coefficients` cepstral coefficients of the frames (orthonormal DCT-II over the mel bins) give their mean
    over time, their standard deviation, and the mean absolute difference of frames two apart. The mean log power in
    each of `bands` groups of mel bins gives log(1 + magnitude) of its spectrum over time, averaged within octaves of
    modulation frequency, starting at one cycle per clip.

    Args:
        features: (B, frames, mels), normalised log powers. The number of mel bins is a multiple of `bands`.
        coefficients: number of cepstral coefficients.
        bands: number of groups of mel bins.
        depth: values further than this below a clip's loudest bin are raised to that level, so that digital silence
            does not dominate.

    Returns:
        (B, 3 * coefficients + octaves * bands) float32; octaves = floor(log2(frames / 2)).

    Raises:
        ValueError: if there are fewer mel bins than coefficients, or their number is not a multiple of `bands`.
    """
    features = features.float()
    frames, mels = features.shape[1:]
    if mels < coefficients or mels % bands:
        raise ValueError(f"{mels} mel bins: the statistics need at least {coefficients} and a multiple of {bands}.")
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
    Mean squared error of the standardised statistics of a clip, predicted linearly from its mean audio token.

    This is a regression of hand-crafted descriptors by a linear worker, as in PASE (Pascual et al., 2019, section
    2.2). The worker is discarded after training. Predicting the mean of the corpus gives a loss of 1.0.

    Args:
        width: width of the audio tokens.
        examples: (n, frames, mels), augmented spectrograms from which means and deviations are estimated.

    Raises:
        ValueError: if there are fewer than 2 examples, or as in `spectral_statistics`.
    """

    def __init__(self, width: int, examples: torch.Tensor):
        super().__init__()
        if len(examples) < 2:
            raise ValueError(f"{len(examples)} clips have no standard deviation; give at least 2.")
        statistics = spectral_statistics(examples)
        self.register_buffer("mean", statistics.mean(0))
        self.register_buffer("deviation", statistics.std(0).clamp_min(1e-6))
        self.worker = nn.Linear(width, statistics.shape[1])

    def forward(self, audio_tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """
        Compute the loss.

        Args:
            audio_tokens: (B, N, width), the output of the audio tower for `features`.
            features: (B, frames, mels), the spectrograms given to the audio tower.

        Returns:
            a scalar.
        """
        with torch.autocast(features.device.type, enabled=False):
            predicted = self.worker(audio_tokens.float().mean(1))
            return nn.functional.mse_loss(predicted, (spectral_statistics(features) - self.mean) / self.deviation)
