"""Feature extractor of LLaVA-Audio: converts waveforms to the spectrograms of the audio towers."""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import TensorType, is_torchaudio_available


MIN_DURATION = 0.1  # seconds; shorter clips have too few frames to be useful
FRAME_LENGTH = {"kaldi": 0.025, "decibel": 0.032}  # seconds, by front end
FRAME_SHIFT = 0.010  # seconds
STATISTICS = {"kaldi": (-5.081, 4.4849), "decibel": (0.0, 1.0)}  # default mean and std, by front end
LOG_FLOOR = float(np.finfo(np.float32).eps)  # Kaldi's lower bound of the mel energies
DECIBEL_FLOOR, DECIBEL_RANGE = 1e-10, 120.0  # lower bound of the mel energies of CED, and dB below the loudest one
BACKENDS = ("auto", "torchaudio", "numpy")


@lru_cache
def _torchaudio_fbank():
    """torchaudio's Kaldi filter bank, or None if torchaudio is not installed or cannot load its library."""
    if not is_torchaudio_available():
        return None
    try:
        from torchaudio.compliance.kaldi import fbank
    except (ImportError, OSError, RuntimeError):  # built for another torch, or for CUDA without a GPU
        return None
    return fbank


class LlavaAudioFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Log-mel spectrogram of a 16 kHz waveform, whose channels, in [-1, 1], are averaged, by one of two front ends:

    - `"kaldi"`, the input of CAV-MAE (Gong et al., 2023, section 3.1): the mean of the waveform is removed, and
      Kaldi's `fbank` is applied (25 ms Hanning window, 10 ms shift, `htk_compat`, no energy, no dither). The frames
      are padded with zeros, so that padding becomes `-mean / std` (+1.133 with the defaults), as in the reference.
    - `"decibel"`, the input of CED (Dinkel et al., 2024): mel energies of centred frames (32 ms periodic Hann window,
      10 ms shift, HTK's mel scale) in decibels, at least -100 dB and at most 120 dB below the loudest one of the clip.
      The waveform is padded with zeros, so that padding is silence.

    The features are normalised as `(x - mean) / std`.

    `feature_extractor_kwargs` of an audio tower's configuration contains the arguments that depend on the tower.

    Args:
        sampling_rate (`int`): rate of the waveforms in Hz.
        num_mel_bins (`int`): mel bins per frame.
        max_length (`int`): frames per clip under `padding="max_length"`; a multiple of `patch_size`.
        patch_size (`int`): frames per column of audio tokens.
        tokens_per_column (`int`, *optional*): audio tokens that the tower returns for `patch_size` frames. The default
            for square patches is `num_mel_bins / patch_size`. A tower that averages over mel returns 1.
        mean, std (`float`, *optional*): statistics for normalisation; by default those of CAV-MAE's corpus for
            `"kaldi"`, and 0 and 1 for `"decibel"`, which CED normalises itself.
        backend (`str`): what computes Kaldi's filter bank: `"torchaudio"`, `"numpy"` (transformers' `audio_utils`), or
            `"auto"`, which uses torchaudio if it loads. The two agree within 1e-3 after normalisation on recordings,
            noise and ordinary tones. For a pure tone near full scale above about 2 kHz, torchaudio's float32 transform
            is off by about 5e-3 in silent bins.
        front_end (`str`): `"kaldi"` or `"decibel"`.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        patch_size: int = 16,
        tokens_per_column: int | None = None,
        mean: float | None = None,
        std: float | None = None,
        padding_value: float = 0.0,
        backend: str = "auto",
        front_end: str = "kaldi",
        **kwargs,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        # The clips of a batch have the same length, or `input_features_mask` marks the padding. Without a padding side
        # here, `pipeline` pads only the text, on the side of the tokenizer.
        self.padding_side = None
        multiples = {"max_length": max_length}
        if tokens_per_column is None:
            multiples["num_mel_bins"] = num_mel_bins
        elif tokens_per_column < 1:
            raise ValueError(f"tokens_per_column={tokens_per_column} must be positive")
        for name, value in multiples.items():
            if value < patch_size or value % patch_size:
                raise ValueError(f"{name}={value} is not a positive multiple of patch_size={patch_size}")
        if front_end not in STATISTICS:
            raise ValueError(f"front_end={front_end!r} is unknown; choose one of {', '.join(STATISTICS)}")
        mean = STATISTICS[front_end][0] if mean is None else mean
        std = STATISTICS[front_end][1] if std is None else std
        if std <= 0:
            raise ValueError(f"std={std} must be positive")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        self.num_mel_bins = num_mel_bins
        self.max_length = max_length
        self.patch_size = patch_size
        self.tokens_per_column = tokens_per_column
        self.mean = mean
        self.std = std
        self.front_end = front_end
        self.backend = backend

    @property
    def window_length(self) -> int:
        """Number of samples in an analysis window."""
        return int(self.sampling_rate * FRAME_LENGTH[self.front_end])

    @property
    def hop_length(self) -> int:
        """Number of samples between the starts of two windows."""
        return int(self.sampling_rate * FRAME_SHIFT)

    @property
    def nats(self) -> float:
        """One unit of the features, in nats of power."""
        return self.std * (math.log(10) / 10 if self.front_end == "decibel" else 1.0)

    def num_frames(self, num_samples: int) -> int:
        """Number of frames of `num_samples` samples, before padding or cutting (10 s: 998, or 1001 in decibels)."""
        if self.front_end == "decibel":
            return 1 + num_samples // self.hop_length
        return max(0, 1 + (num_samples - self.window_length) // self.hop_length)

    def num_audio_tokens(self, num_frames: int) -> int:
        """Number of audio tokens of `num_frames` frames, padded to full columns (1024 frames x 128 mels: 512)."""
        return (self.tokens_per_column or self.num_mel_bins // self.patch_size) * math.ceil(
            num_frames / self.patch_size
        )

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | Sequence,
        sampling_rate: int | None = None,
        padding: str | bool = "max_length",
        max_length: int | None = None,
        return_tensors: str | TensorType | None = "pt",
    ) -> BatchFeature:
        """
        Args:
            raw_speech: one clip or a list of clips. A clip is a numpy array, tensor or list of floats in [-1, 1], of
                shape `(samples,)` or `(channels, samples)`; channels are averaged.
            sampling_rate (`int`, *optional*): sampling rate of the clips in Hz; the rate of the extractor by default.
            padding: `"max_length"` pads or cuts every clip to `max_length` frames, all of which are valid. `"longest"`
                (or True) pads each clip to a multiple of `patch_size` frames, which are valid, and then to the longest
                clip of the batch with frames that are masked. It cuts clips only if `max_length` is passed.
            max_length (`int`, *optional*): number of frames, a multiple of `patch_size`; the extractor's by default.
            return_tensors: `"pt"`, `"np"`, or None for a list of arrays.

        Returns:
            `BatchFeature` with `input_features` `(clips, frames, num_mel_bins)` float32, and with `"longest"`
            `input_features_mask` `(clips, frames)` bool, True for valid frames.

        Raises:
            ValueError: a clip has the wrong shape, integer, NaN or infinite samples, no samples, or less than 0.1 s
                (the message contains its index); the sampling rate is wrong; or `padding` is unknown.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the audio has a sampling rate of {sampling_rate} Hz, the feature extractor needs"
                f" {self.sampling_rate} Hz: resample it first"
            )
        if max_length is not None and (max_length < self.patch_size or max_length % self.patch_size):
            raise ValueError(f"max_length={max_length} is not a positive multiple of patch_size={self.patch_size}")
        clips = self._as_list(raw_speech)
        waveforms = [self._check_waveform(clip, index) for index, clip in enumerate(clips)]

        if padding == "max_length":
            limit = max_length or self.max_length
            lengths = [limit] * len(waveforms)
            total = limit
        elif padding in ("longest", True):
            frames = [self.num_frames(len(waveform)) for waveform in waveforms]
            lengths = [math.ceil(n / self.patch_size) * self.patch_size for n in frames]
            lengths = [min(n, max_length) for n in lengths] if max_length else lengths
            total = max(lengths)
        else:
            raise ValueError(f'padding={padding!r} is not supported; choose "max_length" or "longest"')

        features = np.full((len(waveforms), total, self.num_mel_bins), self.padding_value, dtype=np.float32)
        for row, waveform, length in zip(features, waveforms, lengths, strict=True):
            compute = self._decibels if self.front_end == "decibel" else self._fbank
            frames = compute(waveform, length)
            row[: len(frames)] = frames
        data = {"input_features": (features - self.mean) / self.std}
        if padding != "max_length":
            data["input_features_mask"] = np.arange(total)[None, :] < np.array(lengths)[:, None]
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def _as_list(raw_speech) -> list:
        """Convert one clip or several clips to a list of clips."""
        if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
            return [raw_speech]
        if len(raw_speech) == 0:
            raise ValueError("no audio was given: pass at least one waveform")
        return [raw_speech] if isinstance(raw_speech[0], (int, float, np.number)) else list(raw_speech)

    def _check_waveform(self, clip, index: int) -> np.ndarray:
        """The clip as a mono float32 waveform `(samples,)`. Raises a ValueError with `index` for an invalid clip."""
        if isinstance(clip, torch.Tensor):
            clip = clip.detach().cpu().to(torch.float32 if clip.is_floating_point() else clip.dtype)
        is_array = isinstance(clip, (np.ndarray, torch.Tensor))
        waveform = np.asarray(clip)
        name = f"audio sample {index}"
        if waveform.size == 0:
            raise ValueError(f"{name} is empty: pass a waveform of at least {MIN_DURATION} s")
        if is_array and not np.issubdtype(waveform.dtype, np.floating):
            raise ValueError(f"{name} has {waveform.dtype} samples: scale them to floats in [-1, 1] first")
        if waveform.ndim == 2 and waveform.shape[0] <= waveform.shape[1]:
            waveform = waveform.mean(axis=0, dtype=np.float64)
        if waveform.ndim != 1:
            raise ValueError(f"{name} has shape {waveform.shape}: pass (samples,) or (channels, samples)")
        waveform = waveform.astype(np.float32)
        if not np.isfinite(waveform).all():
            raise ValueError(f"{name} contains NaN or infinite samples: repair or remove it")
        if len(waveform) < MIN_DURATION * self.sampling_rate:
            duration = len(waveform) / self.sampling_rate
            raise ValueError(f"{name} lasts {duration:.3f} s: pass a waveform of at least {MIN_DURATION} s")
        return waveform

    def _decibels(self, waveform: np.ndarray, num_frames: int) -> np.ndarray:
        """Mel energies of a waveform padded or cut to `num_frames`, `(num_frames, num_mel_bins)`, in decibels."""
        samples = torch.from_numpy(waveform)[: (num_frames - 1) * self.hop_length]
        samples = torch.nn.functional.pad(samples, (0, (num_frames - 1) * self.hop_length - len(samples)))
        window = torch.hann_window(self.window_length)
        spectrum = torch.stft(samples, self.window_length, self.hop_length, window=window, return_complex=True)
        filters = _htk_mel_filters(self.num_mel_bins, spectrum.shape[0], self.sampling_rate)
        energies = spectrum.abs().square().T @ torch.from_numpy(filters).float()
        decibels = 10 * energies.clamp(min=DECIBEL_FLOOR).log10()
        return decibels.clamp(min=decibels.max() - DECIBEL_RANGE).numpy()

    def _fbank(self, waveform: np.ndarray, max_frames: int) -> np.ndarray:
        """Log-mel energies of the first frames of a waveform, `(frames, num_mel_bins)` float32, not normalised."""
        # the mean is computed over the whole clip, even if only its beginning is used
        waveform = (waveform - waveform.mean())[: self.window_length + (max_frames - 1) * self.hop_length]
        if self.backend == "numpy" or (self.backend == "auto" and _torchaudio_fbank() is None):
            return self._numpy_fbank(waveform)
        fbank = _torchaudio_fbank()
        if fbank is None:
            raise ImportError('torchaudio cannot be imported: install it, or choose backend="auto"')
        return fbank(
            torch.from_numpy(waveform)[None],
            htk_compat=True,
            sample_frequency=self.sampling_rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=self.num_mel_bins,
            dither=0.0,
            frame_length=1000 * FRAME_LENGTH["kaldi"],
            frame_shift=1000 * FRAME_SHIFT,
        ).numpy()

    def _numpy_fbank(self, waveform: np.ndarray) -> np.ndarray:
        fft_length = 2 ** math.ceil(math.log2(self.window_length))
        return spectrogram(
            waveform,
            window_function(self.window_length, "hann", periodic=False),
            frame_length=self.window_length,
            hop_length=self.hop_length,
            fft_length=fft_length,
            power=2.0,
            center=False,
            preemphasis=0.97,
            mel_filters=_kaldi_mel_filters(self.num_mel_bins, fft_length // 2 + 1, self.sampling_rate),
            log_mel="log",
            mel_floor=LOG_FLOOR,
            remove_dc_offset=True,
        ).T


@lru_cache
def _kaldi_mel_filters(num_mel_bins: int, num_frequency_bins: int, sampling_rate: int) -> np.ndarray:
    """Kaldi's triangular filters `(num_frequency_bins, num_mel_bins)`, from 20 Hz to half the sampling rate."""
    with warnings.catch_warnings():
        # with 128 mel bins and a 512-point transform, some low filters are empty, as in Kaldi
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        return mel_filter_bank(
            num_frequency_bins=num_frequency_bins,
            num_mel_filters=num_mel_bins,
            min_frequency=20.0,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )


@lru_cache
def _htk_mel_filters(num_mel_bins: int, num_frequency_bins: int, sampling_rate: int) -> np.ndarray:
    """Triangular filters on the mel scale of HTK, `(num_frequency_bins, num_mel_bins)`, up to half the rate."""
    return mel_filter_bank(
        num_frequency_bins=num_frequency_bins,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=sampling_rate / 2,
        sampling_rate=sampling_rate,
        norm=None,
        mel_scale="htk",
    )


LlavaAudioFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
