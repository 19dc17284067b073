"""The classes of AVWorld, their pictures and their sounds."""

import itertools

import numpy as np
import pytest
from scipy.signal import spectrogram

from dali_llava.processing.corpora.avworld.classes import (
    ALIKE_LOOKING,
    ALIKE_SOUNDING,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    RIVALS,
    SILENT_OBJECTS,
    SOUNDING_CLASSES,
    names,
    sprite_of,
)
from dali_llava.processing.corpora.avworld.signals import draw
from dali_llava.processing.corpora.avworld.sprites import SPRITES, distance
from dali_llava.processing.corpora.avworld.synthesis import SYNTHESISERS


RATE = 16000


def test_the_table_is_as_large_as_specified():
    assert len(CLASSES) == len(SOUNDING_CLASSES) >= 24
    assert len(SYNTHESISERS) >= 24
    assert len(SILENT_OBJECTS) >= 8
    assert len(COLOURS) == 6
    assert len(BACKGROUNDS) == 6
    assert len(ALIKE_SOUNDING) >= 4
    assert len(ALIKE_LOOKING) >= 4


def test_alike_pairs_share_exactly_one_of_sound_and_look():
    for first, second in ALIKE_SOUNDING:
        assert CLASSES[first].synthesiser == CLASSES[second].synthesiser
        assert sprite_of(first) != sprite_of(second)
    for first, second in ALIKE_LOOKING:
        assert sprite_of(first) == sprite_of(second)
        assert CLASSES[first].synthesiser != CLASSES[second].synthesiser
    # Each class has one partner: no class is ambiguous in both ways, so RIVALS is complete.
    members = [name for pair in ALIKE_SOUNDING + ALIKE_LOOKING for name in pair]
    assert len(members) == len(set(members)) == len(RIVALS)
    for first, second in itertools.combinations(set(CLASSES) - set(members), 2):
        assert CLASSES[first].synthesiser != CLASSES[second].synthesiser
        assert sprite_of(first) != sprite_of(second)


def test_weights_have_a_long_tail_and_an_unambiguous_head():
    total = sum(sounding.weight for sounding in SOUNDING_CLASSES)
    ambiguous = sum(CLASSES[name].weight for name in RIVALS)
    assert ambiguous / total <= 0.35
    for pair in ALIKE_SOUNDING + ALIKE_LOOKING:
        assert CLASSES[pair[0]].weight / CLASSES[pair[1]].weight == pytest.approx(3, rel=0.05)
    weights = sorted((sounding.weight for sounding in SOUNDING_CLASSES), reverse=True)
    assert weights[0] / weights[-1] > 10
    assert not {name for name in RIVALS if CLASSES[name].weight >= weights[4]}


def test_every_class_has_what_it_names():
    for sounding in SOUNDING_CLASSES:
        assert sounding.synthesiser in SYNTHESISERS
        assert 1 <= len(sounding.nouns) <= 2
        assert len(sounding.verbs) == 2
        assert all(len(pair) == 2 for pair in sounding.verbs)
    assert {sprite_of(name) for name in (*CLASSES, *SILENT_OBJECTS)} == set(SPRITES)


def test_no_name_occurs_in_another_class_name_or_verb():
    def contains(text: str, phrase: str) -> bool:
        return f" {phrase} " in f" {text} "

    everything = (*CLASSES, *SILENT_OBJECTS)
    for first, second in itertools.permutations(everything, 2):
        assert not [(a, b) for a in names(first) for b in names(second) if contains(a, b)]
    words = {word for sounding in SOUNDING_CLASSES for pair in sounding.verbs for word in pair}
    words |= set(COLOURS) | {word for background in BACKGROUNDS.values() for word in background.phrase.split()}
    assert not words & {phrase for name in everything for phrase in names(name)}


def test_names_rejects_an_unknown_class():
    assert names("dog") == ("dog", "puppy")
    assert names("chair") == ("chair",)
    with pytest.raises(ValueError, match="no class 'unicorn'; known: dog, siren"):
        names("unicorn")


def test_sprites_differ_even_when_moved_by_a_pixel():
    for first, second in itertools.permutations(SPRITES, 2):
        assert distance(SPRITES[first], SPRITES[second]) >= 12, (first, second)
    for name, sprite in SPRITES.items():
        assert sprite.shape == (8, 8)
        assert sprite.sum() >= 16, name


def test_colours_stand_out_from_each_other_and_from_backgrounds():
    colours = np.array(list(COLOURS.values()), dtype=float)
    grounds = np.array([background.colour for background in BACKGROUNDS.values()], dtype=float)
    between = np.linalg.norm(colours[:, None] - colours[None], axis=-1)[~np.eye(len(colours), dtype=bool)]
    against = np.linalg.norm(colours[:, None] - grounds[None], axis=-1)
    assert between.min() > 90
    assert against.min() > 90


def test_draw_stays_inside_its_range_or_outside_when_shifted():
    rng = np.random.default_rng(0)
    inside = np.array([draw(rng, 100, 400) for _ in range(2000)])
    outside = np.array([draw(rng, 100, 400, 1.0) for _ in range(2000)])
    assert inside.min() >= 100 and inside.max() <= 400
    assert np.median(inside) == pytest.approx(200, rel=0.05)  # log-uniform
    assert ((outside < 100) | (outside > 400)).all()
    assert 0.45 < (outside < 100).mean() < 0.55


@pytest.mark.parametrize("name", SYNTHESISERS)
def test_a_synthesiser_returns_finite_sound_that_depends_on_its_generator_alone(name):
    synthesise = SYNTHESISERS[name]
    for shift, num_samples in ((0.0, RATE), (1.0, RATE), (0.0, 40960)):
        sound = synthesise(np.random.default_rng(3), num_samples, RATE, shift)
        assert sound.shape == (num_samples,) and sound.dtype == np.float32
        assert np.isfinite(sound).all()
        assert np.sqrt(np.mean(np.square(sound))) > 1e-3
        assert np.array_equal(sound, synthesise(np.random.default_rng(3), num_samples, RATE, shift))
        assert not np.array_equal(sound, synthesise(np.random.default_rng(4), num_samples, RATE, shift))


def _statistics(sound: np.ndarray) -> np.ndarray:
    """Mean and standard deviation over time of a log spectrum in 32 bands."""
    _, _, power = spectrogram(sound / sound.std(), RATE, nperseg=512, noverlap=256)
    bands = np.log(power[1:].reshape(32, 8, -1).mean(axis=1) + 1e-8)
    return np.concatenate([bands.mean(axis=1), bands.std(axis=1)])


def test_synthesisers_are_told_apart_by_their_spectra():
    rng = np.random.default_rng(0)
    samples = np.array(
        [[_statistics(f(rng, 40960, RATE, 0.0)) for _ in range(12)] for f in SYNTHESISERS.values()]
    )  # (sounds, samples, statistics)
    scale = samples[:, :6].std(axis=(0, 1))
    centroids = samples[:, :6].mean(axis=1) / scale
    held_out = samples[:, 6:] / scale
    nearest = np.linalg.norm(held_out[:, :, None] - centroids, axis=-1).argmin(axis=-1)
    accuracy = (nearest == np.arange(len(SYNTHESISERS))[:, None]).mean()
    assert accuracy > 0.8  # chance: 1 / 24
