"""Files with an estimated length, or none, are read to their true end and no further."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from dali_llava.processing.media import MediaError, load_audio, load_frames, load_windows, probe


RATE = 16_000


def sound(seconds: float, rate: int = RATE, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


class Pipe(io.RawIOBase):
    """A file without seek, like a pipe: muxers cannot go back to write a length into its header."""

    def __init__(self, path):
        self.file = open(path, "wb")  # noqa: SIM115

    def writable(self):
        return True

    def write(self, data):
        return self.file.write(data)

    def close(self):
        self.file.close()
        super().close()


def encode(
    path, container, codec, waveform, rate=RATE, piped=False, layout="mono", options=None, picture_seconds=None
):
    """Encode `waveform`, (samples,) or (channels, samples), and grey frames if `picture_seconds` is given."""
    target = Pipe(path) if piped else str(path)
    with av.open(target, "w", format=container, options=options or {}) as output:
        track = output.add_stream(codec, rate=rate, layout=layout)
        if picture_seconds is not None:
            video = output.add_stream("libvpx" if container == "webm" else "mpeg2video", rate=25)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for index in range(round(25 * picture_seconds)):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), min(255, 2 * index), np.uint8), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                output.mux(video.encode(frame))
            output.mux(video.encode(None))
        resampler = av.AudioResampler(track.format.name, layout, rate)
        frame = av.AudioFrame.from_ndarray(np.atleast_2d(waveform), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for part in resampler.resample(frame):
            output.mux(track.encode(part))
        output.mux(track.encode(None))
    if piped:
        target.close()
    return path


def variable_rate_mp3(path):
    """4 s of noise at 320 kbit/s, then 12 s of a tone at 32: FFmpeg estimates from the first frames, so too short."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE).astype(np.float32)
    content = b""
    for waveform, rate in ((noise, 160_000), (sound(12.0), 32_000)):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as output:
            track = output.add_stream("libmp3lame", rate=RATE, layout="mono")
            track.bit_rate = rate
            frame = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
            frame.sample_rate = RATE
            output.mux(track.encode(frame))
            output.mux(track.encode(None))
        content += buffer.getvalue()
    path.write_bytes(content)
    return path


MADE = {
    "variable.mp3": lambda path: (variable_rate_mp3(path), 16.0),
    "piped.flac": lambda path: (encode(path, "flac", "flac", sound(6.0), piped=True), 6.0),
    "piped.wav": lambda path: (encode(path, "wav", "pcm_s16le", sound(6.0), piped=True), 6.0),
    "adts.aac": lambda path: (encode(path, "adts", "aac", sound(6.0)), 6.0),
    "transport.ts": lambda path: (encode(path, "mpegts", "aac", sound(6.0), picture_seconds=6.0), 6.0),
    "live.webm": lambda path: (
        encode(path, "webm", "libopus", sound(6.0, 48_000), 48_000, piped=True, options={"live": "1"}),
        6.0,
    ),
    "live_video.webm": lambda path: (
        encode(
            path,
            "webm",
            "libopus",
            sound(6.0, 48_000),
            48_000,
            piped=True,
            options={"live": "1"},
            picture_seconds=6.0,
        ),
        6.0,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_file_is_read_to_its_true_end(tmp_path, name):
    path, seconds = MADE[name](tmp_path / name)
    assert len(load_audio(path)) / RATE == pytest.approx(seconds, abs=0.2)
    assert probe(path).duration == pytest.approx(seconds, abs=0.25)
    last = load_audio(path, start=seconds - 1.5, duration=1.0)
    assert np.sqrt(np.mean(last**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.08)
    windows = list(load_windows(path, 2.5))
    assert [window.start for window in windows] == [2.5 * number for number in range(int(np.ceil(seconds / 2.5)))]
    assert windows[-1].end == pytest.approx(seconds, abs=0.2)
    with pytest.raises(MediaError, match="is outside the sound"):
        load_audio(path, start=seconds + 1.0)


@pytest.mark.parametrize("name", ["transport.ts", "live_video.webm"])
def test_frames_without_a_declared_length(tmp_path, name):
    path, _ = MADE[name](tmp_path / name)
    greys = [np.asarray(image, float).mean() for image in load_frames(path, [0.0, 2.0, 5.9])]
    assert greys == pytest.approx([0, 100, 255], abs=8)
    with pytest.raises(MediaError, match="time 9 s is outside the video, which lasts 6"):
        load_frames(path, 9.0)


@pytest.mark.parametrize("rates", [(44_100, 44_100), (16_000, 44_100), (48_000, 22_050)])
def test_streams_one_after_the_other(tmp_path, rates):
    """A chained Ogg file with one or two sampling rates."""
    content = b""
    for seconds, rate in zip((1.5, 4.0), rates, strict=True):
        buffer = io.BytesIO()
        soundfile.write(buffer, sound(seconds, rate), rate, format="OGG", subtype="VORBIS")
        content += buffer.getvalue()
    (tmp_path / "chained.ogg").write_bytes(content)
    waveform = load_audio(tmp_path / "chained.ogg")
    assert len(waveform) / RATE == pytest.approx(5.5, abs=0.06)
    # 440 Hz throughout: a part read at the rate of the other one would have another pitch
    for start in (0.2, 2.0, 4.2):
        part = waveform[round(start * RATE) : round((start + 1.0) * RATE)]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
        assert int(spectrum.argmax()) == 440
    windows = np.concatenate([window.audio[: 2 * RATE] for window in load_windows(tmp_path / "chained.ogg", 2.0)])
    np.testing.assert_allclose(windows, waveform[: len(windows)], atol=1e-4)


def test_an_ordinary_ogg_stays_with_soundfile(tmp_path):
    soundfile.write(tmp_path / "a.ogg", sound(2.0), RATE, format="OGG", subtype="VORBIS")
    expected, _ = soundfile.read(tmp_path / "a.ogg", dtype="float32")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.ogg"), expected)


@pytest.mark.parametrize("subtype", ["GSM610", "MS_ADPCM", "IMA_ADPCM", "ULAW"])
def test_codecs_in_wav(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", sound(4.0, 8000), 8000, format="WAV", subtype=subtype)
    waveform = load_audio(tmp_path / "a.wav", start=1.0, duration=2.0)
    assert waveform.shape == (32_000,)
    assert np.sqrt(np.mean(waveform**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)
    assert len(load_audio(tmp_path / "a.wav")) / RATE == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize("layouts", [("mono", "stereo"), ("stereo", "mono")])
def test_the_number_of_channels_changes_midway(tmp_path, layouts):
    content = b""
    for layout in layouts:
        channels = 1 if layout == "mono" else 2
        samples = np.repeat(sound(2.0, 44_100)[None], channels, axis=0)
        encode(tmp_path / "part.aac", "adts", "aac", samples, 44_100, layout=layout)
        content += (tmp_path / "part.aac").read_bytes()
    (tmp_path / "a.aac").write_bytes(content)
    waveform = load_audio(tmp_path / "a.aac")
    assert len(waveform) / RATE == pytest.approx(4.0, abs=0.2)
    for start in (0.5, 2.8):
        part = waveform[round(start * RATE) : round((start + 1) * RATE)]
        assert np.sqrt(np.mean(part**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.03)


@pytest.mark.parametrize(
    ("name", "seconds", "tolerance"),
    [
        ("vbr_loud_then_quiet.mp3", 60.08, 0.01),
        ("chained.ogg", 5.5, 0.06),
        ("piped.flac", 6.0, 0.001),
        ("gsm.wav", 6.0, 0.001),
        ("mono_then_stereo.mp3", 3.27, 0.01),
    ],
)
def test_reported_sounds(shared_data, name, seconds, tolerance):
    path = shared_data / "reports" / name
    assert len(load_audio(path)) / RATE == pytest.approx(seconds, abs=tolerance)
    assert probe(path).duration == pytest.approx(seconds, abs=tolerance)
    windows = list(load_windows(path, 2.56))
    assert windows[-1].end == pytest.approx(seconds, abs=0.1)
    assert len(windows) == {"piped.flac": 3, "gsm.wav": 3}.get(name, len(windows))


def test_windows_are_excerpts(tmp_path):
    """Windows from one decoder equal excerpts that are loaded separately."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(44_100 * 8)
    for name, subtype in (("a.wav", "FLOAT"), ("a.flac", "PCM_24"), ("a.mp3", None)):
        soundfile.write(tmp_path / name, noise, 44_100, subtype=subtype)
        windows = list(load_windows(tmp_path / name, 2.56))
        assert [window.start for window in windows] == pytest.approx([0.0, 2.56, 5.12, 7.68])
        for window in windows[:3]:
            expected = load_audio(tmp_path / name, start=window.start, duration=2.61)
            assert window.audio.shape == expected.shape
            np.testing.assert_allclose(window.audio, expected, atol=1e-4)


def test_windows_read_forward_only(tmp_path, monkeypatch):
    """Each packet is decoded once, independent of the number of windows."""
    from dali_llava.processing.media import sound as module

    soundfile.write(tmp_path / "a.mp3", sound(20.0), RATE)
    counts = []
    original = module.decode

    def counting(container, stream):
        for frame in original(container, stream):
            counts.append(frame.samples)
            yield frame

    monkeypatch.setattr(module, "decode", counting)
    windows = load_windows(tmp_path / "a.mp3", 1.0)
    next(windows)
    assert sum(counts) < 8 * RATE  # the first window does not wait for the end of the file
    assert len(list(windows)) >= 19
    assert sum(counts) == pytest.approx(20 * RATE, rel=0.02)
