"""Augmentation: the effect of each change, and that it depends on the generators of the clips alone."""

import pytest
import torch

from dali_llava.train.data.augmentation import (
    UNCHANGED,
    Augmentation,
    augment_spectrograms,
    equalise_spectrograms,
    mask_spectrograms,
    mix_spectrograms,
)


def spectrograms(batch: int = 6, frames: int = 32, mels: int = 4) -> torch.Tensor:
    return torch.randn(batch, frames, mels, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("limit", [None, 3, 0])
def test_roll_permutes_time_and_nothing_else(generators, limit):
    features = spectrograms(batch=40)
    before = features.clone()
    rolled = augment_spectrograms(features, generators(40), noise=0.0, roll=limit)
    shifts = range(-3, 4) if limit == 3 else range(1) if limit == 0 else range(32)
    found = []
    for clip, moved in zip(features, rolled, strict=True):
        matches = [shift for shift in shifts if torch.equal(torch.roll(clip, shift, dims=0), moved)]
        assert len(matches) == 1
        found += matches
    assert len(set(found)) == {None: 20, 3: 7, 0: 1}[limit] or (limit is None and len(set(found)) > 12)
    assert torch.equal(features, before) and rolled.data_ptr() != features.data_ptr()


def test_noise_is_non_negative_and_bounded_by_each_clips_amplitude(generators):
    features = torch.zeros(200, 16, 8)
    noise = augment_spectrograms(features, generators(200), noise=0.1, roll=0)
    assert noise.min() >= 0 and noise.max() <= 0.1
    amplitudes = noise.amax((1, 2))  # of 128 uniform draws: close to the amplitude
    assert amplitudes.min() < 0.01 and amplitudes.max() > 0.09  # U(0, 0.1) over the clips
    assert amplitudes.mean() == pytest.approx(0.05, abs=0.01)
    relative = (noise / amplitudes[:, None, None]).flatten()
    assert relative.mean() == pytest.approx(0.5, abs=0.02) and relative.var() == pytest.approx(1 / 12, abs=0.01)


def test_augmentation_depends_on_the_generators_alone(generators):
    augmented = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(augmented))
        augmented.append(augment_spectrograms(spectrograms(), generators(6, seed)))
    assert torch.equal(augmented[0], augmented[1]) and not torch.equal(augmented[0], augmented[2])


def test_a_clip_is_augmented_as_it_is_alone(generators):
    """All steps but mixing, which needs another clip."""
    augmentation, features = Augmentation(noise=0.2, equaliser=0.4, mask_mels=2, mask_frames=9), spectrograms()
    together = augmentation(features, generators(6))
    for index, generator in enumerate(generators(6)):
        assert torch.equal(augmentation(features[index : index + 1], [generator])[0], together[index])


def test_equaliser_gives_each_clip_a_smooth_gain_of_the_mel_bins(generators):
    features = torch.randn(500, 3, 61, generator=torch.Generator().manual_seed(0))
    gains = equalise_spectrograms(features, generators(500), strength=0.5) - features
    torch.testing.assert_close(gains, gains[:, :1].expand_as(gains), rtol=0, atol=1e-5)  # the same in all frames
    knots = gains[:, 0, ::15]  # bins 0, 15, 30, 45, 60: independent N(0, 0.5)
    torch.testing.assert_close(knots.T.cov(), 0.25 * torch.eye(5), rtol=0, atol=0.05)
    middle = gains[
        :, 0, 5
    ]  # a third of the way between knots: (1 + cos(pi / 3)) / 2 = 3/4 of one knot and 1/4 of the next
    torch.testing.assert_close(middle, 0.75 * knots[:, 0] + 0.25 * knots[:, 1], rtol=0, atol=1e-5)


def test_masks_are_one_band_and_one_span_of_a_random_width(generators):
    clips, frames, mels = 2000, 40, 16
    features = torch.ones(clips, frames, mels)
    masked = mask_spectrograms(features, generators(clips), mels=8, frames=10, value=-2.0)
    assert set(masked.unique().tolist()) == {-2.0, 1.0} and (features == 1).all()
    spans, bands = (masked == -2).all(2), (masked == -2).all(1)  # (clips, frames), (clips, mels)
    assert torch.equal(masked == -2, spans[:, :, None] | bands[:, None, :])
    for masks, limit in ((spans, 10), (bands, 8)):
        steps = masks.float().diff(dim=1, prepend=torch.zeros(clips, 1), append=torch.zeros(clips, 1))
        assert (steps == 1).sum(1).max() == 1  # one run of cells
        widths = masks.sum(1)
        assert widths.unique().tolist() == list(range(limit))
        assert widths.float().mean() == pytest.approx((limit - 1) / 2, rel=0.05)
        assert masks.float().mean(0).min() > 0.02  # every cell is masked in some clips


def test_masks_of_one_axis_and_masks_that_do_not_fit(generators):
    features = spectrograms(batch=50, frames=32, mels=8)
    masked = Augmentation(noise=0.0, roll=0, mask_mels=8, mask_value=9.0)(features, generators(50))
    assert ((masked == 9).all(1) == (masked == 9).any(1)).all() and (masked == 9).any()
    assert torch.equal(masked[masked != 9], features[masked != 9])
    with pytest.raises(ValueError, match="masks of up to 9 mel bins do not fit spectrograms of 8 mel bins"):
        mask_spectrograms(features, generators(50), mels=9, frames=4)


def test_mixing_adds_the_power_of_another_clip(generators):
    power = torch.tensor([1.0, 4.0, 9.0, 16.0])
    unit = 2.5
    features = (power.log() / unit)[:, None, None].expand(4, 3, 2)
    mixed = mix_spectrograms(features, generators(4), share=1.0, unit=unit, faintest=0.0)  # at its own level
    sums = (unit * mixed[:, 0, 0]).exp()
    torch.testing.assert_close(mixed, mixed[:, :1, :1].expand_as(mixed))
    added = (sums - power).sort().values
    torch.testing.assert_close(added, power, rtol=1e-5, atol=0)  # each clip is added once
    assert (sums - power).sub(power).abs().min() > 1  # and not to itself


def test_every_other_clip_is_equally_likely_to_be_added(generators):
    power = torch.tensor([1.0, 2.0, 4.0, 8.0])
    added = []
    for seed in range(600):
        mixed = mix_spectrograms(power.log()[:, None, None], generators(4, seed), share=1.0, faintest=0.0)
        added.append(mixed.exp().flatten() - power)
    for own, others in zip(power, torch.stack(added, 1), strict=True):
        counts = [torch.isclose(others, other, rtol=1e-4).sum().item() for other in power if other != own]
        assert sum(counts) == 600 and all(abs(count - 200) < 50 for count in counts)  # standard deviation 12


def test_mixing_does_not_depend_on_the_order_of_the_batch(generators):
    features, order = spectrograms(), [3, 5, 0, 1, 4, 2]
    mixed = mix_spectrograms(features, generators(6), share=0.7)
    own = generators(6)
    assert torch.equal(mix_spectrograms(features[order], [own[i] for i in order], share=0.7), mixed[order])


def test_mixing_draws_the_level_in_decibels_and_the_share(generators):
    features = torch.zeros(4000, 1, 1)
    added = mix_spectrograms(features, generators(4000), share=0.3).exp() - 1  # powers; 0 where nothing was added
    mixed = added > 1e-3
    assert mixed.float().mean() == pytest.approx(0.3, abs=0.03)
    level = 10 * added[mixed].log10()
    assert level.min() >= -12.01 and level.max() <= 0.01 and level.mean() == pytest.approx(-6, abs=0.3)
    assert torch.equal(mix_spectrograms(features, generators(4000), share=0.0), features)


def test_silence_laid_over_a_clip_changes_nothing(generators):
    features = torch.full((200, 4, 4), -60.0)
    features[0] = 0.0  # the clip with sound is added to one of the others
    mixed = mix_spectrograms(features, generators(200), share=1.0)
    sounding = (mixed.amax((1, 2)) > -13).nonzero().flatten().tolist()
    assert len(sounding) == 2 and 0 in sounding
    torch.testing.assert_close(mixed[0], features[0], rtol=0, atol=1e-6)


def test_augmentation_mixes_equalises_and_then_rolls(generators):
    features, own = spectrograms(mels=8), generators(6)
    expected = equalise_spectrograms(mix_spectrograms(features, own, 0.5, unit=2.0), own, 0.4)
    expected = augment_spectrograms(expected, own, noise=0.2, roll=5)
    augmentation = Augmentation(noise=0.2, roll=5, equaliser=0.4, mix=0.5, unit=2.0)
    assert torch.equal(augmentation(features, generators(6)), expected) and expected.isfinite().all()


def test_default_augmentation_rolls_and_adds_noise(generators):
    features = spectrograms()
    assert torch.equal(Augmentation()(features, generators(6)), augment_spectrograms(features, generators(6)))
    assert torch.equal(UNCHANGED(features, generators(6)), features)
