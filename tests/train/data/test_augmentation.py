"""Augmentation: the effect of each change, and that disabled ones draw no random numbers."""

import pytest
import torch

from dali_llava.train.data.augmentation import (
    UNCHANGED,
    Augmentation,
    augment_spectrograms,
    equalise_spectrograms,
    mix_spectrograms,
)


def spectrograms(batch: int = 6, frames: int = 32, mels: int = 4) -> torch.Tensor:
    return torch.randn(batch, frames, mels, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("limit", [None, 3, 0])
def test_roll_permutes_time_and_nothing_else(limit):
    features = spectrograms(batch=40)
    before = features.clone()
    torch.manual_seed(0)
    rolled = augment_spectrograms(features, noise=0.0, roll=limit)
    shifts = range(-3, 4) if limit == 3 else range(1) if limit == 0 else range(32)
    found = []
    for clip, moved in zip(features, rolled, strict=True):
        matches = [shift for shift in shifts if torch.equal(torch.roll(clip, shift, dims=0), moved)]
        assert len(matches) == 1
        found += matches
    assert len(set(found)) == {None: 20, 3: 7, 0: 1}[limit] or (limit is None and len(set(found)) > 12)
    assert torch.equal(features, before) and rolled.data_ptr() != features.data_ptr()


def test_noise_is_non_negative_and_bounded_by_each_clips_amplitude():
    torch.manual_seed(1)
    features = torch.zeros(200, 16, 8)
    noise = augment_spectrograms(features, noise=0.1, roll=0)
    assert noise.min() >= 0 and noise.max() <= 0.1
    amplitudes = noise.amax((1, 2))  # of 128 uniform draws: close to the amplitude
    assert amplitudes.min() < 0.01 and amplitudes.max() > 0.09  # U(0, 0.1) over the clips
    assert amplitudes.mean() == pytest.approx(0.05, abs=0.01)
    relative = (noise / amplitudes[:, None, None]).flatten()
    assert relative.mean() == pytest.approx(0.5, abs=0.02) and relative.var() == pytest.approx(1 / 12, abs=0.01)


def test_augmentation_depends_on_the_seed_alone():
    augmented = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        augmented.append(augment_spectrograms(spectrograms()))
    assert torch.equal(augmented[0], augmented[1]) and not torch.equal(augmented[0], augmented[2])


def test_equaliser_gives_each_clip_a_smooth_gain_of_the_mel_bins():
    torch.manual_seed(0)
    features = torch.randn(500, 3, 61)
    gains = equalise_spectrograms(features, strength=0.5) - features
    torch.testing.assert_close(gains, gains[:, :1].expand_as(gains), rtol=0, atol=1e-5)  # the same in all frames
    knots = gains[:, 0, ::15]  # bins 0, 15, 30, 45, 60: independent N(0, 0.5)
    torch.testing.assert_close(knots.T.cov(), 0.25 * torch.eye(5), rtol=0, atol=0.05)
    middle = gains[
        :, 0, 5
    ]  # a third of the way between knots: (1 + cos(pi / 3)) / 2 = 3/4 of one knot and 1/4 of the next
    torch.testing.assert_close(middle, 0.75 * knots[:, 0] + 0.25 * knots[:, 1], rtol=0, atol=1e-5)


def test_mixing_adds_the_power_of_another_clip():
    torch.manual_seed(0)
    power = torch.tensor([1.0, 4.0, 9.0, 16.0])
    unit = 2.5
    features = (power.log() / unit)[:, None, None].expand(4, 3, 2)
    mixed = mix_spectrograms(features, share=1.0, unit=unit, faintest=0.0)  # at its own level
    sums = (unit * mixed[:, 0, 0]).exp()
    torch.testing.assert_close(mixed, mixed[:, :1, :1].expand_as(mixed))
    added = (sums - power).sort().values
    torch.testing.assert_close(added, power, rtol=1e-5, atol=0)  # each clip is added once


def test_mixing_draws_the_level_in_decibels_and_the_share():
    torch.manual_seed(0)
    features = torch.zeros(4000, 1, 1)
    added = mix_spectrograms(features, share=0.3).exp() - 1  # powers; 0 where nothing was added
    mixed = added > 1e-3
    assert mixed.float().mean() == pytest.approx(0.3, abs=0.03)
    level = 10 * added[mixed].log10()
    assert level.min() >= -12.01 and level.max() <= 0.01 and level.mean() == pytest.approx(-6, abs=0.3)
    assert torch.equal(mix_spectrograms(features, share=0.0), features)


def test_silence_laid_over_a_clip_changes_nothing():
    torch.manual_seed(0)
    features = torch.full((200, 4, 4), -60.0)
    features[0] = 0.0  # the clip with sound is added to one of the others
    mixed = mix_spectrograms(features, share=1.0)
    sounding = (mixed.amax((1, 2)) > -13).nonzero().flatten().tolist()
    assert len(sounding) == 2 and 0 in sounding
    torch.testing.assert_close(mixed[0], features[0], rtol=0, atol=1e-6)


def test_augmentation_mixes_equalises_and_then_rolls():
    features = spectrograms(mels=8)
    torch.manual_seed(0)
    expected = mix_spectrograms(features, 0.5, unit=2.0)
    expected = augment_spectrograms(equalise_spectrograms(expected, 0.4), noise=0.2, roll=5)
    torch.manual_seed(0)
    augmentation = Augmentation(noise=0.2, roll=5, equaliser=0.4, mix=0.5, unit=2.0)
    assert torch.equal(augmentation(features), expected) and expected.isfinite().all()


def test_what_is_switched_off_draws_nothing():
    features = spectrograms()
    torch.manual_seed(0)
    expected = augment_spectrograms(features)
    torch.manual_seed(0)
    assert torch.equal(Augmentation()(features), expected)
    assert torch.equal(UNCHANGED(features), features)
