"""The filter bank compared with a float64 implementation of Kaldi's formula, backends, lengths and errors."""

import math

import numpy as np
import pytest
import torch

from dali_llava.processing import LlavaAudioFeatureExtractor, feature_extraction_llava_audio
from dali_llava.processing.media import load_audio


RATE = 16000


def kaldi_fbank(waveform: np.ndarray, num_mel_bins: int) -> np.ndarray:
    """Kaldi's log-mel energies computed from the definition in float64, `(frames, num_mel_bins)`."""
    window, shift, fft_length = 400, 160, 512
    waveform = waveform.astype(np.float64)
    starts = np.arange(0, len(waveform) - window + 1, shift)
    frames = np.stack([waveform[start : start + window] for start in starts])
    frames = frames - frames.mean(axis=1, keepdims=True)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = frames - 0.97 * before
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1)))
    power = np.abs(np.fft.rfft(frames, fft_length, axis=1)) ** 2

    def mel(hertz):
        return 1127.0 * np.log(1.0 + np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(20.0), mel(RATE / 2), num_mel_bins + 2)
    bins = mel(np.arange(fft_length // 2 + 1) * RATE / fft_length)
    rising = (bins[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins[None]) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    return np.log(np.maximum(power @ filters.T, np.finfo(np.float32).eps))


def reference(waveform: np.ndarray, num_mel_bins: int, max_length: int) -> np.ndarray:
    fbank = kaldi_fbank(waveform - waveform.mean(), num_mel_bins)[:max_length]
    return (np.pad(fbank, ((0, max_length - len(fbank)), (0, 0))) + 5.081) / 4.4849


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32)


def sine(hertz: float, seconds: float, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


SIGNALS = {
    "noise": noise(2.0),
    "quiet noise": 1e-3 * noise(2.0, seed=1),
    "sine": sine(440.0, 2.0),
    "offset": 0.4 + noise(2.0, seed=2),
    "silence": np.zeros(2 * RATE, np.float32),
    "click": np.eye(1, 2 * RATE, RATE, dtype=np.float32)[0],
}


@pytest.mark.parametrize("backend", ["torchaudio", "numpy"])
@pytest.mark.parametrize("num_mel_bins", [64, 128])
@pytest.mark.parametrize("signal", SIGNALS)
def test_matches_kaldi_in_float64(signal, num_mel_bins, backend):
    extractor = LlavaAudioFeatureExtractor(num_mel_bins=num_mel_bins, max_length=256, backend=backend)
    features = extractor(SIGNALS[signal], sampling_rate=RATE)["input_features"]
    assert features.shape == (1, 256, num_mel_bins) and features.dtype == torch.float32
    expected = reference(SIGNALS[signal], num_mel_bins, 256)
    np.testing.assert_allclose(features[0].numpy(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_mel_bins", [64, 128])
@pytest.mark.parametrize("signal", SIGNALS)
def test_backends_agree(signal, num_mel_bins):
    outputs = [
        LlavaAudioFeatureExtractor(num_mel_bins=num_mel_bins, max_length=256, backend=backend)(SIGNALS[signal])
        for backend in ("torchaudio", "numpy")
    ]
    torch.testing.assert_close(outputs[0]["input_features"], outputs[1]["input_features"], rtol=0, atol=1e-3)


def test_full_scale_high_tone_is_where_float32_shows():
    """torchaudio's float32 transform has rounding errors of about 1e-7 of the loudest bin, close to the floor."""
    tone = sine(7000.0, 2.0, amplitude=1.0)
    outputs = [LlavaAudioFeatureExtractor(backend=backend)(tone) for backend in ("torchaudio", "numpy")]
    torch.testing.assert_close(outputs[0]["input_features"], outputs[1]["input_features"], rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["00W1lcxW-WU_40.000.mp4", "KlsG1EnBEjc_000361.mp4"])
def test_backends_agree_on_a_recording(name, shared_data):
    waveform = load_audio(shared_data / "clips" / name)
    outputs = [LlavaAudioFeatureExtractor(backend=backend)(waveform) for backend in ("torchaudio", "numpy")]
    torch.testing.assert_close(outputs[0]["input_features"], outputs[1]["input_features"], rtol=0, atol=1e-3)
    expected = reference(waveform, 128, 1024)
    np.testing.assert_allclose(outputs[0]["input_features"][0].numpy(), expected, rtol=0, atol=1e-3)


def test_auto_backend_without_torchaudio(monkeypatch):
    clip = noise(1.0)
    expected = LlavaAudioFeatureExtractor(backend="numpy")(clip)["input_features"]
    monkeypatch.setattr(feature_extraction_llava_audio, "_torchaudio_fbank", lambda: None)
    torch.testing.assert_close(LlavaAudioFeatureExtractor()(clip)["input_features"], expected, rtol=0, atol=0)
    with pytest.raises(ImportError, match="torchaudio"):
        LlavaAudioFeatureExtractor(backend="torchaudio")(clip)


def test_ten_seconds_are_998_frames_and_padding_is_normalised_zero():
    extractor = LlavaAudioFeatureExtractor()
    assert extractor.num_frames(10 * RATE) == 998
    assert extractor.num_audio_tokens(1024) == 512
    features = extractor(noise(10.0))
    assert "input_features_mask" not in features
    padding = features["input_features"][0, 998:]
    torch.testing.assert_close(padding, torch.full((26, 128), 5.081 / 4.4849))
    assert math.isclose(5.081 / 4.4849, 1.133, abs_tol=1e-3)


def test_long_clip_is_cut_and_its_mean_is_the_whole_clips():
    clip = np.concatenate([0.2 + noise(3.0), noise(9.0, seed=3)])
    features = LlavaAudioFeatureExtractor(max_length=256)(clip)["input_features"]
    np.testing.assert_allclose(features[0].numpy(), reference(clip, 128, 256), rtol=0, atol=1e-3)


def test_longest_pads_to_patches_and_masks_the_rest():
    extractor = LlavaAudioFeatureExtractor(num_mel_bins=64, max_length=256)
    clips = [noise(2.0), noise(0.5, seed=1)]  # 198 and 48 frames
    features = extractor(clips, padding="longest")
    assert features["input_features"].shape == (2, 208, 64)
    mask = features["input_features_mask"]
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [208, 48]
    assert not mask[1, 48:].any()
    fixed = extractor(clips)["input_features"]
    torch.testing.assert_close(features["input_features"], fixed[:, :208], rtol=0, atol=0)
    # longer than max_length: not cut unless a limit is passed
    assert extractor(noise(4.0), padding="longest")["input_features"].shape == (1, 400, 64)
    cut = extractor(noise(4.0), padding="longest", max_length=128)
    assert cut["input_features"].shape == (1, 128, 64) and cut["input_features_mask"].all()


@pytest.mark.parametrize("signal", SIGNALS)
def test_decibels_equal_torchaudio(signal):
    """MelSpectrogram and AmplitudeToDB as CED uses them, on the waveform padded to 256 frames."""
    transforms = pytest.importorskip("torchaudio.transforms", reason="torchaudio cannot be imported", exc_type=OSError)
    spectrogram = transforms.MelSpectrogram(
        RATE, n_fft=512, win_length=512, hop_length=160, f_min=0, f_max=8000, n_mels=64, center=True
    )
    waveform = torch.nn.functional.pad(torch.from_numpy(SIGNALS[signal]), (0, 255 * 160 - 2 * RATE))
    expected = transforms.AmplitudeToDB(top_db=120)(spectrogram(waveform)).T
    features = LlavaAudioFeatureExtractor(front_end="decibel", num_mel_bins=64, max_length=256)(SIGNALS[signal])
    assert features["input_features"].shape == (1, 256, 64)
    torch.testing.assert_close(features["input_features"][0], expected, rtol=0, atol=1e-3)


def test_decibels_of_a_tone_and_of_padding():
    """A tone of amplitude A has the power (A / 2 * sum of the window)^2 in its frequency bin."""
    extractor = LlavaAudioFeatureExtractor(front_end="decibel", num_mel_bins=64)
    assert (extractor.mean, extractor.std, extractor.window_length) == (0.0, 1.0, 512)
    assert extractor.num_frames(10 * RATE) == 1001
    tone = sine(1000.0, 10.0)  # frequency bin 32 of 31.25 Hz
    loud, quiet = (extractor(amplitude * tone)["input_features"][0] for amplitude in (1.0, 0.1))
    # The periodic Hann window of 512 samples sums to 256, and to -128 one bin beside the tone.
    power = {31: 64.0**2 / 4, 32: 64.0**2, 33: 64.0**2 / 4}  # amplitude 0.5
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 66) / 2595) - 1)  # HTK's mel scale
    expected = [
        sum(
            value * max(0, min((31.25 * bin - low) / (centre - low), (high - 31.25 * bin) / (high - centre)))
            for bin, value in power.items()
        )
        for low, centre, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
    ]
    heard = np.array(expected) > 0
    assert 2 <= heard.sum() <= 5
    np.testing.assert_allclose(loud[500].numpy()[heard], 10 * np.log10(np.array(expected)[heard]), atol=1e-3)
    assert loud[500][~torch.from_numpy(heard)].max() < -40
    # silence: -100 dB, unless that is more than 120 dB below the loudest cell
    assert (quiet[1003:] == -100).all()
    torch.testing.assert_close(loud[1003:], (loud.max() - 120).clamp(min=-100).expand(21, 64))


@pytest.mark.parametrize("front_end", ["kaldi", "decibel"])
def test_nats_are_the_unit_of_the_features(front_end):
    """Half the amplitude is a quarter of the power, log(4) nats less."""
    extractor = LlavaAudioFeatureExtractor(front_end=front_end, num_mel_bins=64, std=3.0)
    loud, soft = (extractor(amplitude * noise(10.3))["input_features"] for amplitude in (1.0, 0.5))
    assert extractor.nats * (loud - soft)[:, :1000, 10:].mean() == pytest.approx(math.log(4), abs=1e-3)


def test_decibels_of_a_batch_equal_those_alone():
    extractor = LlavaAudioFeatureExtractor(front_end="decibel", num_mel_bins=64)
    clips = [0.5 * noise(2.0), noise(0.5, seed=1), noise(12.0, seed=2)]  # 201, 51 and 1201 frames
    batch = extractor(clips, padding="longest", max_length=1024)
    assert batch["input_features_mask"].sum(1).tolist() == [208, 64, 1024]
    for clip, features, mask in zip(clips, batch["input_features"], batch["input_features_mask"], strict=True):
        alone = extractor(clip, padding="longest", max_length=1024)["input_features"][0]
        torch.testing.assert_close(features[mask], alone, rtol=0, atol=0)


def test_accepts_arrays_tensors_lists_and_channels():
    extractor = LlavaAudioFeatureExtractor(max_length=64)
    clip = noise(0.5)
    expected = extractor(clip)["input_features"]
    for same in (torch.from_numpy(clip), clip.tolist(), clip.astype(np.float64), [clip], np.stack([clip] * 8)):
        torch.testing.assert_close(extractor(same)["input_features"], expected, rtol=0, atol=0)
    # the first two channels cancel, which leaves half of the second pair
    channels = np.stack([clip, -clip, clip, clip])
    torch.testing.assert_close(extractor(channels)["input_features"], extractor(0.5 * clip)["input_features"])
    assert extractor([clip, clip[:4000]], return_tensors="np")["input_features"].shape == (2, 64, 128)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros(0, np.float32), "audio sample 1 is empty"),
        (np.full(RATE, np.nan, np.float32), "audio sample 1 contains NaN or infinite"),
        (np.full(RATE, np.inf, np.float32), "audio sample 1 contains NaN or infinite"),
        (np.zeros(800, np.float32), r"audio sample 1 lasts 0\.050 s: .* at least 0\.1 s"),
        (np.zeros(RATE, np.int16), "audio sample 1 has int16 samples"),
        (np.zeros((RATE, 2), np.float32), "audio sample 1 has shape"),
        (np.zeros((1, 2, RATE), np.float32), "audio sample 1 has shape"),
    ],
)
def test_bad_clip_is_named_by_its_index(clip, message):
    with pytest.raises(ValueError, match=message) as error:
        LlavaAudioFeatureExtractor()([noise(1.0), clip])
    assert "\n" not in str(error.value)


def test_bad_arguments():
    extractor = LlavaAudioFeatureExtractor()
    with pytest.raises(ValueError, match="44100 Hz.*16000 Hz"):
        extractor(noise(1.0), sampling_rate=44100)
    with pytest.raises(ValueError, match="padding='do_not_pad'"):
        extractor(noise(1.0), padding="do_not_pad")
    with pytest.raises(ValueError, match="max_length=100"):
        extractor(noise(1.0), max_length=100)
    with pytest.raises(ValueError, match="no audio"):
        extractor([])
    with pytest.raises(ValueError, match="num_mel_bins=100"):
        LlavaAudioFeatureExtractor(num_mel_bins=100)
    with pytest.raises(ValueError, match="max_length=1000"):
        LlavaAudioFeatureExtractor(max_length=1000)
    with pytest.raises(ValueError, match="backend='librosa'"):
        LlavaAudioFeatureExtractor(backend="librosa")
    with pytest.raises(ValueError, match="front_end='mfcc' is unknown; choose one of kaldi, decibel"):
        LlavaAudioFeatureExtractor(front_end="mfcc")


def test_tokens_per_column():
    """Square patches give one token per mel row; a tower that averages over mel gives one per column."""
    assert [LlavaAudioFeatureExtractor().num_audio_tokens(frames) for frames in (1, 16, 17, 1024)] == [8, 8, 16, 512]
    averaged = LlavaAudioFeatureExtractor(num_mel_bins=80, tokens_per_column=1)
    assert [averaged.num_audio_tokens(frames) for frames in (1, 16, 17, 1024)] == [1, 1, 2, 64]
    # the number of mel bins is arbitrary if it does not determine the number of tokens
    uneven = LlavaAudioFeatureExtractor(num_mel_bins=70, patch_size=4, tokens_per_column=2, max_length=256)
    assert uneven.num_audio_tokens(256) == 128
    assert uneven(noise(1.0), padding="longest")["input_features"].shape == (1, 100, 70)
    with pytest.raises(ValueError, match="tokens_per_column=0 must be positive"):
        LlavaAudioFeatureExtractor(tokens_per_column=0)


def test_save_and_load_decibels(tmp_path):
    extractor = LlavaAudioFeatureExtractor(front_end="decibel", num_mel_bins=64, max_length=256)
    extractor.save_pretrained(tmp_path)
    loaded = LlavaAudioFeatureExtractor.from_pretrained(tmp_path)
    clip = noise(1.0)
    torch.testing.assert_close(loaded(clip)["input_features"], extractor(clip)["input_features"], rtol=0, atol=0)


def test_save_and_load(tmp_path):
    extractor = LlavaAudioFeatureExtractor(
        num_mel_bins=64, max_length=256, mean=-4.0, std=2.0, backend="numpy", tokens_per_column=3
    )
    extractor.save_pretrained(tmp_path)
    loaded = LlavaAudioFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    clip = noise(1.0)
    torch.testing.assert_close(loaded(clip)["input_features"], extractor(clip)["input_features"], rtol=0, atol=0)
