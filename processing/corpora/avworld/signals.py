"""Building blocks of the synthesisers: random parameters, oscillators, noise, filters, envelopes and events."""

from functools import cache

import numpy as np
from scipy.signal import fftconvolve, lfilter


# Largest distance of a shifted parameter from its training range, relative to the logarithmic width of the range.
SHIFT_EXTENT = 0.15
TABLE_SIZE = 4096


def draw(rng: np.random.Generator, low: float, high: float, shift: float = 0.0) -> float:
    """Draw a log-uniform parameter.

    For shift 0 it is in [low, high]. Otherwise it is outside, beyond either end, by between half and all of
    shift * SHIFT_EXTENT logarithmic widths of the range.
    """
    width = np.log(high / low)
    if shift == 0:
        return float(low * np.exp(width * rng.random()))
    excess = width * shift * SHIFT_EXTENT * (0.5 + 0.5 * rng.random())
    return float(high * np.exp(excess) if rng.random() < 0.5 else low * np.exp(-excess))


@cache
def _sines(count: int) -> np.ndarray:
    """Harmonics 1 to `count` over one period, (count, TABLE_SIZE) float32."""
    harmonics = np.arange(1, count + 1)[:, None]
    return np.sin(2 * np.pi * harmonics * np.arange(TABLE_SIZE) / TABLE_SIZE).astype(np.float32)


def seconds(num_samples: int, sampling_rate: int) -> np.ndarray:
    """Time of each sample in seconds, (num_samples,) float32."""
    return np.arange(num_samples, dtype=np.float32) / np.float32(sampling_rate)


def phase_of(frequency: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Phase (n,) in cycles of an oscillator with the given frequency in Hz at each sample."""
    return np.cumsum(frequency, dtype=np.float64) / sampling_rate


def oscillate(phase: np.ndarray, amplitudes: np.ndarray | list[float]) -> np.ndarray:
    """Sum of amplitudes[k] sin(2 pi (k + 1) phase), (n,) float32, by table lookup."""
    table = np.asarray(amplitudes, dtype=np.float32) @ _sines(len(amplitudes))
    return table[(phase * TABLE_SIZE).astype(np.int64) & (TABLE_SIZE - 1)]


def noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """White noise of unit variance, (num_samples,) float32."""
    return rng.standard_normal(num_samples, dtype=np.float32)


def resonate(signal: np.ndarray, frequency: float, bandwidth: float, sampling_rate: int) -> np.ndarray:
    """Apply a two-pole band-pass with unit gain at `frequency`; `frequency` and `bandwidth` are in Hz.

    The coefficients are those of Bristow-Johnson's audio EQ cookbook.
    """
    frequency = min(frequency, 0.45 * sampling_rate)
    omega = 2 * np.pi * frequency / sampling_rate
    alpha = np.sin(omega) * bandwidth / (2 * frequency)
    return lfilter([alpha, 0.0, -alpha], [1 + alpha, -2 * np.cos(omega), 1 - alpha], signal).astype(np.float32)


def lowpass(signal: np.ndarray, frequency: float, sampling_rate: int) -> np.ndarray:
    """Apply a one-pole low-pass with a cutoff of `frequency` Hz."""
    pole = np.exp(-2 * np.pi * frequency / sampling_rate)
    return lfilter([1 - pole], [1.0, -pole], signal).astype(np.float32)


def highpass(signal: np.ndarray, frequency: float, sampling_rate: int) -> np.ndarray:
    """Apply a one-pole high-pass: the signal minus the output of `lowpass`."""
    return signal - lowpass(signal, frequency, sampling_rate)


def swell(num_samples: int, attack: float, release: float) -> np.ndarray:
    """Envelope (num_samples,) that rises over the fraction `attack` of its length and falls over `release`."""
    position = np.linspace(0, 1, num_samples, dtype=np.float32)
    return np.clip(np.minimum(position / attack, (1 - position) / release), 0, 1)


def onsets(
    rng: np.random.Generator, num_samples: int, sampling_rate: int, period: float, jitter: float = 0.0
) -> np.ndarray:
    """Sample indices of events every `period` seconds, each delayed by up to `jitter` periods.

    The first event starts within the first 0.3 s or the first period, whichever is shorter, plus the delay.
    """
    start = rng.random() * min(period, 0.3)
    times = start + period * np.arange(int(num_samples / sampling_rate / period) + 1)
    times = times + jitter * period * rng.random(times.size)
    indices = (times * sampling_rate).astype(np.int64)
    return indices[indices < num_samples]


def lay(num_samples: int, starts: np.ndarray, events: list[np.ndarray]) -> np.ndarray:
    """Add an event at each start; returns (num_samples,) float32. Events are truncated at the end."""
    out = np.zeros(num_samples, dtype=np.float32)
    for start, event in zip(starts, events, strict=True):
        stop = min(num_samples, start + event.size)
        out[start:stop] += event[: stop - start]
    return out


def impulses(num_samples: int, starts: np.ndarray, heights: np.ndarray | float = 1.0) -> np.ndarray:
    """Single-sample impulses, (num_samples,) float32, as input of `resonate`."""
    out = np.zeros(num_samples, dtype=np.float32)
    np.add.at(out, starts, heights)
    return out


def decays(num_samples: int, starts: np.ndarray, time_constant: float, sampling_rate: int) -> np.ndarray:
    """Sum of exponential decays, one from each start, (num_samples,) float32; `time_constant` is in seconds."""
    pole = np.exp(-1 / (time_constant * sampling_rate))
    return lfilter([1.0], [1.0, -pole], impulses(num_samples, starts)).astype(np.float32)


def reverberate(
    signal: np.ndarray,
    rng: np.random.Generator,
    sampling_rate: int,
    time: tuple[float, float],
    level: tuple[float, float],
) -> np.ndarray:
    """Add reverberation: the signal convolved with exponentially decaying noise (Polack's room model).

    Args:
        signal: (n,) float32.
        rng: random generator.
        sampling_rate: in Hz.
        time: range of the reverberation time to -60 dB, in seconds.
        level: range of the level of reverberant relative to direct sound, in dB.

    Returns:
        (n,) float32.
    """
    size = int(rng.uniform(*time) * sampling_rate)
    room = noise(rng, size) * np.exp(-6.9 * np.arange(size, dtype=np.float32) / size)
    room *= 10 ** (rng.uniform(*level) / 20) / np.linalg.norm(room)
    return signal + fftconvolve(signal, room)[: signal.size].astype(np.float32)
