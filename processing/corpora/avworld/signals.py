"""Building blocks of the synthesisers: parameter draws, oscillators, noise, filters, envelopes, trains of events."""

from functools import cache

import numpy as np
from scipy.signal import fftconvolve, lfilter


# How far outside its training range a shifted parameter lies, as a share of the range's logarithmic width.
SHIFT_EXTENT = 0.15
TABLE_SIZE = 4096


def draw(rng: np.random.Generator, low: float, high: float, shift: float = 0.0) -> float:
    """A log-uniform parameter: in [low, high] for shift 0, else beyond either end, by at most shift * SHIFT_EXTENT
    widths and at least half of that."""
    width = np.log(high / low)
    if shift == 0:
        return float(low * np.exp(width * rng.random()))
    excess = width * shift * SHIFT_EXTENT * (0.5 + 0.5 * rng.random())
    return float(high * np.exp(excess) if rng.random() < 0.5 else low * np.exp(-excess))


@cache
def _sines(count: int) -> np.ndarray:
    """(count, TABLE_SIZE) float32 harmonics 1 to `count` of one period."""
    harmonics = np.arange(1, count + 1)[:, None]
    return np.sin(2 * np.pi * harmonics * np.arange(TABLE_SIZE) / TABLE_SIZE).astype(np.float32)


def seconds(num_samples: int, sampling_rate: int) -> np.ndarray:
    """(num_samples,) float32 times in seconds."""
    return np.arange(num_samples, dtype=np.float32) / np.float32(sampling_rate)


def phase_of(frequency: np.ndarray, sampling_rate: int) -> np.ndarray:
    """(n,) phase in cycles of an oscillator whose frequency in Hz is given at each sample."""
    return np.cumsum(frequency, dtype=np.float64) / sampling_rate


def oscillate(phase: np.ndarray, amplitudes: np.ndarray | list[float]) -> np.ndarray:
    """(n,) float32 sum of amplitudes[k] sin(2 pi (k + 1) phase), read from a table of one period."""
    table = np.asarray(amplitudes, dtype=np.float32) @ _sines(len(amplitudes))
    return table[(phase * TABLE_SIZE).astype(np.int64) & (TABLE_SIZE - 1)]


def noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """(num_samples,) float32 white noise of unit variance."""
    return rng.standard_normal(num_samples, dtype=np.float32)


def resonate(signal: np.ndarray, frequency: float, bandwidth: float, sampling_rate: int) -> np.ndarray:
    """A two-pole band-pass of unit gain at `frequency`, both in Hz (Bristow-Johnson's cookbook)."""
    frequency = min(frequency, 0.45 * sampling_rate)
    omega = 2 * np.pi * frequency / sampling_rate
    alpha = np.sin(omega) * bandwidth / (2 * frequency)
    return lfilter([alpha, 0.0, -alpha], [1 + alpha, -2 * np.cos(omega), 1 - alpha], signal).astype(np.float32)


def lowpass(signal: np.ndarray, frequency: float, sampling_rate: int) -> np.ndarray:
    """A one-pole low-pass with its corner at `frequency` Hz."""
    pole = np.exp(-2 * np.pi * frequency / sampling_rate)
    return lfilter([1 - pole], [1.0, -pole], signal).astype(np.float32)


def highpass(signal: np.ndarray, frequency: float, sampling_rate: int) -> np.ndarray:
    """What `lowpass` takes away."""
    return signal - lowpass(signal, frequency, sampling_rate)


def swell(num_samples: int, attack: float, release: float) -> np.ndarray:
    """(num_samples,) envelope that rises over the share `attack` of its length and falls over the share `release`."""
    position = np.linspace(0, 1, num_samples, dtype=np.float32)
    return np.clip(np.minimum(position / attack, (1 - position) / release), 0, 1)


def onsets(
    rng: np.random.Generator, num_samples: int, sampling_rate: int, period: float, jitter: float = 0.0
) -> np.ndarray:
    """Sample indices of events every `period` seconds, each off by up to `jitter` periods, the first one early."""
    start = rng.random() * min(period, 0.3)
    times = start + period * np.arange(int(num_samples / sampling_rate / period) + 1)
    times = times + jitter * period * rng.random(times.size)
    indices = (times * sampling_rate).astype(np.int64)
    return indices[indices < num_samples]


def lay(num_samples: int, starts: np.ndarray, events: list[np.ndarray]) -> np.ndarray:
    """(num_samples,) float32 with an event added at each start, cut at the end."""
    out = np.zeros(num_samples, dtype=np.float32)
    for start, event in zip(starts, events, strict=True):
        stop = min(num_samples, start + event.size)
        out[start:stop] += event[: stop - start]
    return out


def impulses(num_samples: int, starts: np.ndarray, heights: np.ndarray | float = 1.0) -> np.ndarray:
    """(num_samples,) float32 of single samples, to be rung by `resonate`."""
    out = np.zeros(num_samples, dtype=np.float32)
    np.add.at(out, starts, heights)
    return out


def decays(num_samples: int, starts: np.ndarray, time_constant: float, sampling_rate: int) -> np.ndarray:
    """(num_samples,) float32 sum of exponential decays in seconds, one from each start."""
    pole = np.exp(-1 / (time_constant * sampling_rate))
    return lfilter([1.0], [1.0, -pole], impulses(num_samples, starts)).astype(np.float32)


def reverberate(
    signal: np.ndarray,
    rng: np.random.Generator,
    sampling_rate: int,
    time: tuple[float, float],
    level: tuple[float, float],
) -> np.ndarray:
    """Add noise that decays exponentially, convolved with the signal (Polack's model of a room).

    Args:
        signal: (n,) float32.
        time: range of the seconds to -60 dB.
        level: range of the decibels of reverberant over direct sound.

    Returns:
        (n,) float32.
    """
    size = int(rng.uniform(*time) * sampling_rate)
    room = noise(rng, size) * np.exp(-6.9 * np.arange(size, dtype=np.float32) / size)
    room *= 10 ** (rng.uniform(*level) / 20) / np.linalg.norm(room)
    return signal + fftconvolve(signal, room)[: signal.size].astype(np.float32)
