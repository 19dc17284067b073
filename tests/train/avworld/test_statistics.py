"""Statistics of spectrograms: analytic cases, an independent implementation, and values of the loss."""

import math

import numpy as np
import pytest
import torch
from scipy.fft import dct

from dali_llava.train.avworld.sound_statistics import StatisticsLoss, spectral_statistics


COEFFICIENTS, BANDS, OCTAVES = 24, 8, 7  # of 256 frames


def parts(statistics: torch.Tensor) -> list[torch.Tensor]:
    """Returns mean, deviation and change of the cepstrum, (B, 24) each, and the modulations, (B, 7, 8)."""
    *cepstral, modulation = statistics.split([COEFFICIENTS] * 3 + [OCTAVES * BANDS], dim=1)
    return [*cepstral, modulation.unflatten(1, (OCTAVES, BANDS))]


def test_flat_and_steady_sound_has_a_level_and_nothing_else():
    mean, deviation, change, modulation = parts(spectral_statistics(torch.full((2, 256, 64), 0.5)))
    torch.testing.assert_close(mean[:, 0], torch.full((2,), 0.5 * math.sqrt(64)))
    for rest in (mean[:, 1:], deviation, change, modulation):
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-5)


def test_pulsing_sound_shows_at_its_rate():
    """10 cycles per clip with amplitude 0.3 in one band: |X| = 0.3 * 256 / 2 at bin 10, in the octave from 8 to 15."""
    time = torch.arange(256, dtype=torch.float64)
    features = torch.zeros(1, 256, 64, dtype=torch.float64)
    features[:, :, 16:24] = (0.3 * torch.sin(2 * torch.pi * 10 * time / 256))[None, :, None]
    mean, deviation, change, modulation = parts(spectral_statistics(features))
    expected = torch.zeros(1, OCTAVES, BANDS)
    expected[0, 3, 2] = math.log1p(0.3 * 128 / 8)
    torch.testing.assert_close(modulation, expected, rtol=0, atol=1e-4)
    # coefficient 0 is the sum over 8 of 64 bins, over sqrt(64): a sine of amplitude 0.3
    assert deviation[0, 0] == pytest.approx(0.3 / math.sqrt(2) * math.sqrt(256 / 255), rel=1e-4)
    assert abs(mean[0, 0]) < 1e-5
    # |sin(a + 2 w) - sin(a)| = 2 |sin(w)| |cos(a + w)|, with a mean over a of 2 / pi times that
    assert change[0, 0] == pytest.approx(0.3 * 2 * math.sin(2 * math.pi * 10 / 256) * 2 / math.pi, rel=0.02)


def test_a_float64_implementation_agrees():
    features = torch.randn(3, 256, 64, generator=torch.Generator().manual_seed(0))
    for clip, told in zip(features.double().numpy(), spectral_statistics(features), strict=True):
        clip = np.maximum(clip, clip.max() - 5)
        cepstrum = dct(clip, norm="ortho", axis=1)[:, :24]
        change = np.abs(cepstrum[2:] - cepstrum[:-2]).mean(0)
        levels = clip.reshape(256, 8, 8).mean(2)
        spectrum = np.abs(np.fft.fft(levels - levels.mean(0), axis=0))
        octaves = [np.log1p(spectrum[2**n : 2 ** (n + 1)].mean(0)) for n in range(7)]
        expected = np.concatenate([cepstrum.mean(0), cepstrum.std(0, ddof=1), change, *octaves])
        np.testing.assert_allclose(told.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_what_lies_far_below_the_loudest_bin_counts_as_silence():
    features = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(1))
    features[:, 128:] = -5.0 + features.max()
    silent = features.clone()
    silent[:, 128:] = -40.0
    assert torch.equal(spectral_statistics(features), spectral_statistics(silent))


@pytest.mark.parametrize(("frames", "octaves"), [(32, 4), (100, 5), (1024, 9)])
def test_octaves_follow_the_clips_length(frames, octaves):
    assert spectral_statistics(torch.randn(2, frames, 128)).shape == (2, 3 * 24 + octaves * 8)


@pytest.mark.parametrize("mels", [16, 30])
def test_mel_bins_that_do_not_serve_are_named(mels):
    with pytest.raises(ValueError, match=f"{mels} mel bins: the statistics need at least 24 and a multiple of 8"):
        spectral_statistics(torch.zeros(1, 32, mels))


@pytest.fixture
def examples() -> torch.Tensor:
    return torch.randn(40, 64, 32, generator=torch.Generator().manual_seed(2))


def test_telling_the_mean_costs_one(examples):
    loss = StatisticsLoss(8, examples)
    torch.nn.init.zeros_(loss.worker.weight)
    torch.nn.init.zeros_(loss.worker.bias)
    tokens = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(3))
    assert loss(tokens, examples).item() == pytest.approx(39 / 40, rel=1e-4)  # unbiased deviations


def test_a_worker_that_knows_pays_nothing(examples):
    """Tokens with the standardised statistics as their mean, and a worker that is the identity."""
    statistics = spectral_statistics(examples)
    standard = (statistics - statistics.mean(0)) / statistics.std(0)
    loss = StatisticsLoss(standard.shape[1], examples)
    torch.nn.init.eye_(loss.worker.weight)
    torch.nn.init.zeros_(loss.worker.bias)
    spread = torch.tensor([-0.5, 0.0, 0.5])[None, :, None]  # the tokens differ; their mean is used
    assert loss(standard[:, None] + spread, examples).item() < 1e-10


def test_the_loss_is_float32_under_autocast(examples):
    torch.manual_seed(0)
    loss = StatisticsLoss(8, examples)
    tokens = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(3))
    expected = loss(tokens, examples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(tokens, examples), expected)


def test_constant_statistics_give_no_nan():
    steady = torch.zeros(4, 64, 32)
    loss = StatisticsLoss(8, steady)
    assert loss(torch.zeros(4, 5, 8), steady).isfinite()


def test_one_clip_has_no_deviation(examples):
    with pytest.raises(ValueError, match="1 clips have no standard deviation; give at least 2"):
        StatisticsLoss(8, examples[:1])
