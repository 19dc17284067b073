"""Scenes of AVWorld: content, sound and pictures."""

import numpy as np
import pytest

from dali_llava.processing.corpora.avworld.classes import CLASSES, LOOK_AMBIGUOUS, RIVALS, SILENT_OBJECTS
from dali_llava.processing.corpora.avworld.scenes import (
    CELL,
    DURATION,
    MIN_SECONDS,
    MOTION,
    NUM_SAMPLES,
    OFF_SCREEN,
    PEAK,
    SAMPLING_RATE,
    SHIFTED_SNR,
    SILENT_SOURCE,
    SNR,
    SOLO,
    SOURCE_COUNTS,
    Entity,
    Scene,
    render_audio,
    render_frames,
    sample_scene,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(6000)]


def _within(successes: int, trials: int, share: float, deviations: float = 4.0) -> bool:
    """Whether a count lies within the given number of standard deviations of a binomial mean."""
    return abs(successes - trials * share) <= deviations * np.sqrt(trials * share * (1 - share))


def test_shares_of_off_screen_and_silent_things(scenes):
    audible = [entity for scene in scenes for entity in scene.audible]
    assert _within(sum(entity.cell is None for entity in audible), len(audible), OFF_SCREEN)
    able = [entity for scene in scenes for entity in scene.visible if entity.name in CLASSES]
    assert _within(sum(entity.span is None for entity in able), len(able), SILENT_SOURCE)


def test_numbers_and_classes_of_sources(scenes):
    for count, share in enumerate(SOURCE_COUNTS, start=1):
        assert _within(sum(len(scene.audible) == count for scene in scenes), len(scenes), share)
    singles = [scene.audible[0].name for scene in scenes if len(scene.audible) == 1]
    total = sum(sounding.weight for sounding in CLASSES.values())
    for name in ("dog", "rain", "microwave"):
        assert _within(singles.count(name), len(singles), CLASSES[name].weight / total)


def test_every_scene_keeps_the_rules(scenes):
    for scene in scenes:
        assert 1 <= len(scene.audible) <= 3
        assert scene.visible
        members = [entity.name for entity in scene.entities]
        assert len(members) == len(set(members))
        assert not [name for name in members if RIVALS.get(name) in members]
        cells = [entity.cell for entity in scene.visible]
        assert cells == sorted(set(cells)) and 0 <= cells[0] and cells[-1] < 9
        levels = [entity.level for entity in scene.audible]
        assert levels[0] == 0 and levels == sorted(levels, reverse=True)
        for entity in scene.audible:
            start, end = entity.span
            assert 0 <= start < end <= DURATION + 1e-9 and end - start >= MIN_SECONDS - 1e-9
        for entity in scene.entities:
            assert entity.span is None or entity.name in CLASSES
            assert entity.span is not None or entity.cell is not None
        assert SNR[0] <= scene.snr <= SNR[1] and scene.shift == 0


def test_seen_is_what_sounds_and_shows_and_looks_like_nothing_else():
    scene = Scene(
        entities=(
            Entity("dog", "red", 4, (0.0, 2.0), -3.0),
            Entity("rain", "red", 1, (0.0, 2.0), 0.0),
            Entity("sparrow", "red", 2, (0.0, 2.0), -1.0),  # looks like a canary
            Entity("siren", "red", None, (0.0, 2.0), -2.0),  # off screen
            Entity("cat", "red", 3, None),  # silent
            Entity("chair", "red", 0, None),
        ),
        background="grass",
        snr=10.0,
    )
    assert [entity.name for entity in scene.audible] == ["rain", "sparrow", "siren", "dog"]
    assert [entity.name for entity in scene.visible] == ["chair", "rain", "sparrow", "cat", "dog"]
    assert [entity.name for entity in scene.seen] == ["rain", "dog"]
    assert "sparrow" in LOOK_AMBIGUOUS and "rain" not in LOOK_AMBIGUOUS


def test_curated_scenes_show_all_that_sounds_and_hide_nothing():
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = sample_scene(rng, curated=True)
        assert all(entity.cell is not None for entity in scene.audible)
        assert all(entity.span is not None for entity in scene.entities if entity.name in CLASSES)
        assert all(entity.name in SILENT_OBJECTS for entity in scene.entities if entity.span is None)


def test_soloists_mostly_sound_alone_throughout_and_show():
    rng = np.random.default_rng(0)
    soloists = ("dog", "clock", "rain")
    scenes = [sample_scene(rng, soloists=soloists) for _ in range(6000)]
    heard = [scene for scene in scenes if any(entity.name in soloists for entity in scene.audible)]
    alone = [
        scene
        for scene in heard
        if (own := [entity for entity in scene.entities if entity.name in CLASSES])
        and len(own) == 1
        and own[0].span == (0.0, DURATION)
        and own[0].cell is not None
    ]
    assert all(scene.audible[0].level == 0.0 for scene in alone)
    assert any(len(scene.entities) > 1 for scene in alone)  # some with silent objects
    # The others have one visible source that sounds throughout, and no silent class: 0.72 * 0.35 * 0.85 * 0.9.
    assert _within(len(alone), len(heard), SOLO + (1 - SOLO) * 0.72 * 0.35 * 0.85 * 0.9)
    names = [scene.audible[0].name for scene in alone]
    for name in soloists:
        assert _within(names.count(name), len(names), 1 / 3)
    others = [scene for scene in scenes if scene not in heard]
    assert {len(scene.audible) for scene in others} == {1, 2, 3}
    doubled = 2 * sum(CLASSES[name].weight for name in soloists)
    rest = sum(sounding.weight for name, sounding in CLASSES.items() if name not in soloists)
    single = sum(len(scene.audible) == 1 for scene in others)
    assert _within(single, len(scenes), SOURCE_COUNTS[0] * rest / (rest + doubled))


def test_without_soloists_scenes_are_as_ever():
    scene = sample_scene(np.random.default_rng(5))
    things = [(entity.name, entity.colour, entity.cell) for entity in scene.entities]
    assert things == [("dog", "orange", 1), ("handbell", "purple", None), ("umbrella", "yellow", 3)]
    assert scene.background == "grass"


def test_shifted_scenes_lie_outside_the_training_ranges():
    rng = np.random.default_rng(2)
    shifted = [sample_scene(rng, shifted=True) for _ in range(200)]
    assert all(scene.shift == 1 and SHIFTED_SNR[0] <= scene.snr <= SHIFTED_SNR[1] <= SNR[0] for scene in shifted)


def test_audio_has_its_length_and_peak_and_sounds_when_its_source_does():
    scene = Scene((Entity("kettle", "red", 0, (0.8, 1.8)),), "grass", snr=30.0)
    audio = render_audio(scene, np.random.default_rng(0))
    assert audio.shape == (NUM_SAMPLES,) and audio.dtype == np.float32
    assert np.abs(audio).max() == pytest.approx(PEAK, abs=1e-6)
    power = np.square(audio)
    inside = power[int(0.85 * SAMPLING_RATE) : int(1.75 * SAMPLING_RATE)].mean()
    outside = power[: int(0.8 * SAMPLING_RATE)].mean()
    assert 10 * np.log10(inside / outside) == pytest.approx(30.0, abs=1.5)  # for a steady whistle, this is the SNR
    assert power[int(1.8 * SAMPLING_RATE) :].mean() == pytest.approx(outside, rel=0.1)


def test_level_scales_a_source():
    spans = (0.0, DURATION)

    def kettle_power(level: float) -> float:
        entities = (Entity("car", "red", 0, spans, 0.0), Entity("kettle", "red", 1, spans, level))
        spectrum = np.abs(np.fft.rfft(render_audio(Scene(entities, "grass", snr=60.0), np.random.default_rng(5)))) ** 2
        frequencies = np.fft.rfftfreq(NUM_SAMPLES, 1 / SAMPLING_RATE)
        return spectrum[(frequencies > 1000) & (frequencies < 3500)].sum() / spectrum[frequencies < 300].sum()

    assert 10 * np.log10(kettle_power(0.0) / kettle_power(-8.0)) == pytest.approx(8.0, abs=0.3)


def test_own_synthesisers_replace_the_built_in_ones():
    scene = Scene((Entity("dog", "red", 0, (0.0, DURATION)),), "grass", snr=100.0)

    def tone(rng, num_samples, sampling_rate, shift):
        return np.sin(2 * np.pi * 1000 * np.arange(num_samples) / sampling_rate).astype(np.float32)

    audio = render_audio(scene, np.random.default_rng(0), {"dog": tone})
    assert np.fft.rfftfreq(NUM_SAMPLES, 1 / SAMPLING_RATE)[np.abs(np.fft.rfft(audio)).argmax()] == 1000


def test_shift_adds_a_tail_after_the_source():
    entity = Entity("kettle", "red", 0, (0.2, 1.4))
    tail = slice(int(1.42 * SAMPLING_RATE), int(1.5 * SAMPLING_RATE))

    def tail_power(shift: float) -> float:
        audio = render_audio(Scene((entity,), "grass", snr=40.0, shift=shift), np.random.default_rng(0))
        return np.square(audio[tail]).mean() / np.square(audio).mean()

    assert tail_power(1.0) > 30 * tail_power(0.0)


def test_frames_show_each_object_in_its_cell_and_colour():
    scene = Scene(
        (Entity("key", "red", 0, None), Entity("house", "blue", 3, None), Entity("dog", "green", None, (0.0, 2.0))),
        "cave",
        snr=10.0,
    )
    frames = render_frames(scene, np.random.default_rng(0))
    assert len(frames) == 4
    for frame in frames:
        assert frame.shape == (48, 48, 3) and frame.dtype == np.uint8
        red = (frame[..., 0] > 150) & (frame[..., 2] < 100)
        blue = (frame[..., 2] > 150) & (frame[..., 0] < 100)
        green = (frame[..., 1] > 150) & (frame[..., 0] < 100)
        reach = CELL + MOTION
        assert red[:reach, :reach].sum() == red.sum() > 40
        assert blue[-reach:, -reach:].sum() == blue.sum() > 60
        assert green.sum() == 0
    assert not np.array_equal(frames[0], frames[1])


def test_backgrounds_differ():
    means = []
    for background in ("grass", "snow", "sand", "street", "room", "cave"):
        scene = Scene((Entity("key", "red", 0, None),), background, snr=10.0)
        means.append(render_frames(scene, np.random.default_rng(0), 1)[0][16:].mean(axis=(0, 1)))
    distances = np.linalg.norm(np.array(means)[:, None] - np.array(means)[None], axis=-1)
    assert distances[~np.eye(6, dtype=bool)].min() > 30
