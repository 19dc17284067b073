"""Synthesisers of AVWorld, one per sound.

A synthesiser is a function `f(rng, num_samples, sampling_rate, shift) -> (num_samples,) float32` with an arbitrary
output level. Each call draws new parameters. If `shift` is greater than 0, they are outside the training ranges.
"""

from collections.abc import Callable

import numpy as np

from .signals import (
    decays,
    draw,
    highpass,
    impulses,
    lay,
    lowpass,
    noise,
    onsets,
    oscillate,
    phase_of,
    resonate,
    seconds,
    swell,
)


Synthesiser = Callable[[np.random.Generator, int, int, float], np.ndarray]


def _harmonics(count: int, slope: float) -> np.ndarray:
    return np.arange(1, count + 1) ** -slope


def bark(rng, num_samples, sampling_rate, shift):
    """Short falling growls with a rough edge."""
    length, pitch = draw(rng, 0.12, 0.2, shift), draw(rng, 280, 520, shift)
    size = int(length * sampling_rate)
    position = np.linspace(0, 1, size, dtype=np.float32)
    starts = onsets(rng, num_samples, sampling_rate, draw(rng, 0.3, 0.55, shift), jitter=0.3)
    tone = oscillate(phase_of(pitch * (1.25 - 0.6 * position), sampling_rate), _harmonics(10, 0.7))
    event = (tone + 0.8 * noise(rng, size)) * swell(size, 0.1, 0.7)
    event = resonate(event, draw(rng, 700, 1100, shift), 900, sampling_rate)
    return lay(num_samples, starts, [event] * starts.size)


def siren(rng, num_samples, sampling_rate, shift):
    """A tone that glides up and down without a pause."""
    low, span = draw(rng, 500, 750, shift), draw(rng, 1.6, 2.2, shift)
    cycles = draw(rng, 0.6, 1.6, shift) * seconds(num_samples, sampling_rate) + rng.random()
    glide = 0.5 - 0.5 * np.cos(2 * np.pi * cycles)
    return oscillate(phase_of(low * span**glide, sampling_rate), [1.0, 0.15, 0.5, 0.1, 0.25])


def cry(rng, num_samples, sampling_rate, shift):
    """Long wavering wails with short breaths between."""
    pitch, length = draw(rng, 380, 560, shift), draw(rng, 0.55, 0.9, shift)
    size = int(length * sampling_rate)
    position = np.linspace(0, 1, size, dtype=np.float32)
    wobble = 0.04 * np.sin(2 * np.pi * draw(rng, 6, 9, shift) * length * position)
    contour = pitch * (0.85 + 0.3 * np.sin(np.pi * position) + wobble)
    event = oscillate(phase_of(contour, sampling_rate), _harmonics(9, 0.5)) * swell(size, 0.12, 0.25)
    event = event * 0.3 + resonate(event, draw(rng, 2400, 3200, shift), 700, sampling_rate)
    starts = onsets(rng, num_samples, sampling_rate, length + draw(rng, 0.1, 0.25, shift))
    return lay(num_samples, starts, [event] * starts.size)


def crow(rng, num_samples, sampling_rate, shift):
    """Four harsh notes, the third high, the last long and falling."""
    pitch, length = draw(rng, 520, 760, shift), draw(rng, 1.0, 1.4, shift)
    size = int(length * sampling_rate)
    knots = [0.0, 0.14, 0.15, 0.27, 0.28, 0.45, 0.46, 0.75, 1.0]
    contour = np.interp(np.linspace(0, 1, size), knots, [0.8, 0.9, 1.0, 1.05, 1.2, 1.6, 1.45, 1.3, 0.75])
    gate = np.interp(np.linspace(0, 1, size), [0, 0.02, 0.12, 0.15, 0.25, 0.28, 0.43, 0.46, 0.9, 1],
                     [0, 1, 1, 0.1, 1, 0.2, 1, 0.5, 1, 0])  # fmt: skip
    event = oscillate(phase_of(pitch * contour, sampling_rate), _harmonics(8, 0.3)) * gate
    event = (event + 0.15 * noise(rng, size) * gate).astype(np.float32)
    event = resonate(event, draw(rng, 1500, 2200, shift), 1200, sampling_rate)
    starts = onsets(rng, num_samples, sampling_rate, length + draw(rng, 0.15, 0.4, shift))
    return lay(num_samples, starts, [event] * starts.size)


def meow(rng, num_samples, sampling_rate, shift):
    """A soft glide up and down with a vowel that opens and closes."""
    pitch, length = draw(rng, 560, 850, shift), draw(rng, 0.4, 0.65, shift)
    size = int(length * sampling_rate)
    position = np.linspace(0, 1, size, dtype=np.float32)
    contour = pitch * (0.8 + 0.35 * np.sin(np.pi * position**0.7))
    phase = phase_of(contour, sampling_rate)
    openness = np.sin(np.pi * position) ** 2
    event = oscillate(phase, [1.0, 0.4]) * (1 - openness) + oscillate(phase, [0.3, 0.9, 0.7, 0.3, 0.1]) * openness
    starts = onsets(rng, num_samples, sampling_rate, length + draw(rng, 0.3, 0.6, shift), jitter=0.1)
    return lay(num_samples, starts, [(event * swell(size, 0.2, 0.4)).astype(np.float32)] * starts.size)


def rotor(rng, num_samples, sampling_rate, shift):
    """Low noise, amplitude-modulated by the rotor blades."""
    rate = draw(rng, 10, 17, shift)
    blades = (0.5 + 0.5 * np.sin(2 * np.pi * rate * seconds(num_samples, sampling_rate))) ** 3
    wash = lowpass(noise(rng, num_samples), draw(rng, 300, 600, shift), sampling_rate)
    whine = oscillate(seconds(num_samples, sampling_rate) * draw(rng, 80, 120, shift), [1.0, 0.6, 0.4])
    return (wash * (0.1 + 3 * blades) + 0.06 * whine).astype(np.float32)


def chainsaw(rng, num_samples, sampling_rate, shift):
    """A bright rasp that revs up and down."""
    revs = np.sin(2 * np.pi * draw(rng, 0.7, 1.5, shift) * seconds(num_samples, sampling_rate) + 6.3 * rng.random())
    pitch = draw(rng, 95, 150, shift) * (1 + 0.3 * revs)
    tone = oscillate(phase_of(pitch, sampling_rate), _harmonics(40, 0.6))
    rasp = resonate(tone, draw(rng, 1800, 2600, shift), 2000, sampling_rate)
    return 0.4 * tone + rasp + 0.4 * highpass(noise(rng, num_samples), 2500, sampling_rate)


def crackle(rng, num_samples, sampling_rate, shift):
    """Sparse clicks of very unequal strength over a faint roar."""
    count = max(6, rng.poisson(draw(rng, 18, 40, shift) * num_samples / sampling_rate))
    heights = np.exp(0.9 * rng.standard_normal(count))
    clicks = impulses(num_samples, rng.integers(0, num_samples, count), heights)
    clicks = resonate(clicks, draw(rng, 1800, 3500, shift), 2500, sampling_rate)
    return clicks + 0.02 * lowpass(noise(rng, num_samples), draw(rng, 150, 300, shift), sampling_rate)


def surf(rng, num_samples, sampling_rate, shift):
    """Broad noise that rises slowly and breaks."""
    rate = draw(rng, 0.6, 1.1, shift)
    cycle = (rate * seconds(num_samples, sampling_rate) + rng.random()) % 1.0
    rise = np.clip(np.minimum(cycle / 0.6, (1 - cycle) / 0.4), 0, 1) ** 2
    body = lowpass(noise(rng, num_samples), draw(rng, 500, 1000, shift), sampling_rate)
    spray = highpass(noise(rng, num_samples), 1500, sampling_rate)
    return (body * (0.15 + rise) + 0.25 * spray * rise**2).astype(np.float32)


def sneeze(rng, num_samples, sampling_rate, shift):
    """A rising breath, then a burst."""
    inhale, burst = int(draw(rng, 0.2, 0.35, shift) * sampling_rate), int(draw(rng, 0.2, 0.32, shift) * sampling_rate)
    breath = resonate(noise(rng, inhale), draw(rng, 1000, 1500, shift), 600, sampling_rate)
    breath = breath * np.linspace(0, 0.5, inhale, dtype=np.float32)
    voice = oscillate(phase_of(np.linspace(420, 220, burst), sampling_rate), _harmonics(8, 0.8))
    hiss = resonate(noise(rng, burst), draw(rng, 2800, 4200, shift), 2500, sampling_rate)
    event = np.concatenate([breath, (2.0 * hiss + 0.5 * voice) * swell(burst, 0.05, 0.8)])
    starts = onsets(rng, num_samples, sampling_rate, draw(rng, 0.8, 1.2, shift), jitter=0.1)
    return lay(num_samples, starts, [event] * starts.size)


def drum(rng, num_samples, sampling_rate, shift):
    """Alternating kick and snare on a steady beat."""
    starts = onsets(rng, num_samples, sampling_rate, draw(rng, 0.18, 0.32, shift))
    size = int(0.22 * sampling_rate)
    time = seconds(size, sampling_rate)
    pitch = draw(rng, 60, 100, shift) * (1 + 1.5 * np.exp(-time / 0.03))
    kick = oscillate(phase_of(pitch, sampling_rate), [1.0]) * np.exp(-time / draw(rng, 0.06, 0.1, shift))
    snare = highpass(noise(rng, size), 1000, sampling_rate) * 0.4 * np.exp(-time / 0.04)
    return lay(num_samples, starts, [kick if beat % 2 == 0 else 0.5 * kick + snare for beat in range(starts.size)])


def hoot(rng, num_samples, sampling_rate, shift):
    """Soft low whistles: one, two short, one long."""
    pitch, beat = draw(rng, 300, 430, shift), draw(rng, 0.16, 0.24, shift)
    lengths = [1.6, 0.7, 0.7, 2.0]
    notes = []
    for length in lengths:
        size = int(length * beat * sampling_rate)
        fall = pitch * (1.04 - 0.08 * np.linspace(0, 1, size, dtype=np.float32))
        notes += [oscillate(phase_of(fall, sampling_rate), [1.0, 0.12]) * swell(size, 0.3, 0.4)]
        notes += [np.zeros(int(0.35 * beat * sampling_rate), dtype=np.float32)]
    phrase = np.concatenate(notes)
    starts = onsets(rng, num_samples, sampling_rate, phrase.size / sampling_rate + 0.2)
    return lay(num_samples, starts, [phrase] * starts.size)


def patter(rng, num_samples, sampling_rate, shift):
    """Steady hiss with many short drops."""
    count = rng.poisson(draw(rng, 150, 400, shift) * num_samples / sampling_rate)
    drops = impulses(num_samples, rng.integers(0, num_samples, count), 8 * rng.random(count))
    drops = resonate(drops, draw(rng, 3500, 5000, shift), 2500, sampling_rate)
    return drops + 0.5 * highpass(noise(rng, num_samples), draw(rng, 1500, 3000, shift), sampling_rate)


def engine(rng, num_samples, sampling_rate, shift):
    """A low, even drone of pulses."""
    drift = 1 + 0.03 * np.sin(2 * np.pi * draw(rng, 0.5, 1.5, shift) * seconds(num_samples, sampling_rate))
    pulses = oscillate(phase_of(draw(rng, 28, 50, shift) * drift, sampling_rate), np.ones(20))
    body = resonate(pulses, draw(rng, 120, 220, shift), 120, sampling_rate)
    return body + 0.15 * pulses + 0.3 * lowpass(noise(rng, num_samples), 400, sampling_rate)


def whistle(rng, num_samples, sampling_rate, shift):
    """Two steady tones of similar pitch in air noise, starting with a rise in pitch."""
    pitch = draw(rng, 1300, 2100, shift) * (1 - 0.25 * np.exp(-seconds(num_samples, sampling_rate) / 0.25))
    first, second = phase_of(pitch, sampling_rate), phase_of(pitch * draw(rng, 1.12, 1.25, shift), sampling_rate)
    air = resonate(noise(rng, num_samples), float(pitch[-1]), 1500, sampling_rate)
    return oscillate(first, [1.0, 0.2]) + oscillate(second, [0.7, 0.1]) + draw(rng, 0.4, 0.8, shift) * air


def beep(rng, num_samples, sampling_rate, shift):
    """One tone, switched on and off for equal durations."""
    gate = (draw(rng, 1.4, 2.4, shift) * seconds(num_samples, sampling_rate) + 0.5 * rng.random()) % 1.0 < 0.5
    tone = oscillate(seconds(num_samples, sampling_rate) * draw(rng, 950, 1350, shift), [1.0, 0.0, 0.3])
    return lowpass(gate.astype(np.float32), 100, sampling_rate) * tone


def chirp(rng, num_samples, sampling_rate, shift):
    """Short, high, falling notes at uneven intervals."""
    pitch, size = draw(rng, 3400, 4600, shift), int(draw(rng, 0.05, 0.09, shift) * sampling_rate)
    position = np.linspace(0, 1, size, dtype=np.float32)
    note = oscillate(phase_of(pitch * (1.25 - 0.5 * position), sampling_rate), [1.0, 0.1]) * swell(size, 0.2, 0.5)
    starts = onsets(rng, num_samples, sampling_rate, draw(rng, 0.16, 0.28, shift), jitter=0.6)
    return lay(num_samples, starts, [note] * starts.size)


def trill(rng, num_samples, sampling_rate, shift):
    """Long, high phrases with fast vibrato that rise or fall."""
    length, pitch = draw(rng, 0.5, 0.8, shift), draw(rng, 3200, 4400, shift)
    size = int(length * sampling_rate)
    position = np.linspace(0, 1, size, dtype=np.float32)
    waver = 0.08 * np.sin(2 * np.pi * draw(rng, 18, 32, shift) * length * position)
    starts = onsets(rng, num_samples, sampling_rate, length + draw(rng, 0.08, 0.2, shift))
    phrases = []
    for _ in starts:
        contour = pitch * (1 + waver + rng.uniform(-0.35, 0.35) * (position - 0.5))
        phrases.append(oscillate(phase_of(contour, sampling_rate), [1.0, 0.08]) * swell(size, 0.1, 0.1))
    return lay(num_samples, starts, phrases)


def _strikes(rng, num_samples, sampling_rate, starts, pitch, ratios, time_constant):
    """Struck metal: inharmonic partials, of which the higher ones decay faster."""
    time = seconds(num_samples, sampling_rate)
    out = np.zeros(num_samples, dtype=np.float32)
    for index, ratio in enumerate(ratios):
        partial = oscillate(time * pitch * ratio + rng.random(), [1.0])
        out += partial * decays(num_samples, starts, time_constant / (1 + 0.4 * index), sampling_rate) / (1 + index)
    return out


def toll(rng, num_samples, sampling_rate, shift):
    """A large bell: slow strokes with long decay."""
    starts = onsets(rng, num_samples, sampling_rate, draw(rng, 0.8, 1.3, shift))
    ratios = (1.0, 0.5, 1.19, 1.5, 2.0, 2.75)
    return _strikes(rng, num_samples, sampling_rate, starts, draw(rng, 380, 620, shift), ratios, 0.7)


def jingle(rng, num_samples, sampling_rate, shift):
    """A small, shaken bell."""
    starts = onsets(rng, num_samples, sampling_rate, draw(rng, 0.11, 0.2, shift), jitter=0.25)
    ratios = (1.0, 1.37, 1.83, 2.3)
    return _strikes(rng, num_samples, sampling_rate, starts, draw(rng, 1700, 2600, shift), ratios, 0.12)


def ring(rng, num_samples, sampling_rate, shift):
    """Two bells struck alternately at high speed, with pauses."""
    period = draw(rng, 0.8, 1.1, shift)
    starts = onsets(rng, num_samples, sampling_rate, 1 / draw(rng, 18, 26, shift))
    starts = starts[(starts / sampling_rate + period * 0.3 * rng.random()) % period < 0.65 * period]
    pitch = draw(rng, 1100, 1500, shift)
    first = _strikes(rng, num_samples, sampling_rate, starts[::2], pitch, (1.0, 2.6), 0.06)
    return first + _strikes(rng, num_samples, sampling_rate, starts[1::2], 1.19 * pitch, (1.0, 2.6), 0.06)


def buzz(rng, num_samples, sampling_rate, shift):
    """The hum of a motor in long pulses."""
    gate = (draw(rng, 1.2, 2.0, shift) * seconds(num_samples, sampling_rate) + 0.4 * rng.random()) % 1.0 < 0.65
    hum = oscillate(seconds(num_samples, sampling_rate) * draw(rng, 140, 200, shift), [0.6, 1.0, 0.8, 0.7, 0.6, 0.3])
    return lowpass(gate.astype(np.float32), 40, sampling_rate) * hum


def tick(rng, num_samples, sampling_rate, shift):
    """Dry clicks that alternate between two pitches."""
    starts = onsets(rng, num_samples, sampling_rate, draw(rng, 0.2, 0.4, shift))
    pitch = draw(rng, 2200, 3200, shift)
    first = resonate(impulses(num_samples, starts[::2]), pitch, 250, sampling_rate)
    return first + resonate(impulses(num_samples, starts[1::2]), 0.75 * pitch, 250, sampling_rate)


def cuckoo(rng, num_samples, sampling_rate, shift):
    """Two flute notes, the second lower."""
    pitch, size = draw(rng, 620, 860, shift), int(draw(rng, 0.22, 0.32, shift) * sampling_rate)
    notes = [
        oscillate(seconds(size, sampling_rate) * frequency, [1.0, 0.2, 0.05]) * swell(size, 0.1, 0.3)
        for frequency in (pitch, 0.8 * pitch)
    ]
    phrase = np.concatenate(notes)
    phrase += 0.05 * resonate(noise(rng, phrase.size), 2 * pitch, 800, sampling_rate)
    starts = onsets(rng, num_samples, sampling_rate, phrase.size / sampling_rate + draw(rng, 0.3, 0.6, shift))
    return lay(num_samples, starts, [phrase] * starts.size)


SYNTHESISERS: dict[str, Synthesiser] = {
    function.__name__: function
    for function in (
        bark, siren, cry, crow, meow, rotor, chainsaw, crackle, surf, sneeze, drum, hoot, patter, engine, whistle,
        beep, chirp, trill, toll, jingle, ring, buzz, tick, cuckoo,
    )
}  # fmt: skip
