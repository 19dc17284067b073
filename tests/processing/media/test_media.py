"""Decode synthetic media with known samples and frames, in the containers and codecs that PyAV wheels can write."""

import io
import os
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from dali_llava.processing.media import MediaError, frames, load_audio, load_frames, load_image, probe


SIZE = (64, 48)
FRAME_RATE = 25
HERTZ, AMPLITUDE = 440.0, 0.5


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """`(samples, channels)`: channel c is the tone times 2 (c + 1) / (channels + 1), so the mean is the tone."""
    wave = AMPLITUDE * np.sin(2 * np.pi * HERTZ * np.arange(round(seconds * rate)) / rate)
    gains = 2 * np.arange(1, channels + 1) / (channels + 1)
    return (wave[:, None] * gains).astype(np.float32)


def tone_error(waveform: np.ndarray, start: float = 0.0) -> float:
    """
    Return the error of the tone in a 16 kHz waveform, in amplitude and phase, as a share of its amplitude.

    It is measured at the frequency of the tone, over whole periods and without 50 ms at both ends. Noise of a lossy
    codec does not count, but a wrong gain or a shift in time does (1 ms: 2.0, one sample: 0.17).
    """
    inner = waveform[800 : 800 + (len(waveform) - 1600) // 400 * 400]  # 400 samples are 11 periods
    time = start + (800 + np.arange(len(inner))) / 16000
    amplitude = 2j * np.mean(inner * np.exp(-2j * np.pi * HERTZ * time))
    return float(abs(amplitude / AMPLITUDE - 1))


def picture(index: int) -> np.ndarray:
    """Frame `index` of a synthetic video, which shows its index as 8 black or white columns, lowest bit first."""
    row = np.repeat(np.array([255 * (index >> bit & 1) for bit in range(8)], np.uint8), SIZE[0] // 8)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (SIZE[1], SIZE[0], 3)))


def number(image: Image.Image) -> int:
    """Decode the index that `picture` drew."""
    columns = np.asarray(image.convert("L"), np.float64).reshape(SIZE[1], 8, -1).mean(axis=(0, 2))
    return sum(1 << bit for bit, value in enumerate(columns) if value > 127)


def write_media(
    path,
    container,
    video=None,
    audio=None,
    seconds=3.0,
    rate=44100,
    gop=12,
    rotation=0,
    movflags=None,
    delay=0.0,
):
    """Encode two channels of `tone` and numbered frames at 25 per second."""
    options = {"movflags": movflags} if movflags else {}
    with av.open(str(path), "w", format=container, options=options) as output:
        if video:
            pictures = output.add_stream(video, rate=FRAME_RATE)
            pictures.width, pictures.height, pictures.gop_size = *SIZE, gop
            pictures.pix_fmt = "yuv420p"
            if rotation:
                pictures.set_display_rotation(rotation)
        if audio:
            sound = output.add_stream(audio, rate=rate, layout="stereo")
        if video:
            for index in range(round(seconds * FRAME_RATE)):
                frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, FRAME_RATE)
                output.mux(pictures.encode(frame))
            output.mux(pictures.encode(None))
        if audio:
            samples = np.ascontiguousarray(tone(seconds, rate, 2).T)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(delay * rate)
            output.mux(sound.encode(frame))
            output.mux(sound.encode(None))
    return path


def message(call) -> str:
    """Return the one-line message of the error that a call raises."""
    with pytest.raises(MediaError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# name, container, video codec, audio codec, rate, largest error of the decoded tone
MADE = [
    ("a.mp4", "mp4", "libx264", "aac", 44100, 0.01),
    ("b.mp4", "mp4", "libx265", "aac", 48000, 0.01),
    ("c.mp4", "mp4", "mpeg4", "libmp3lame", 32000, 0.07),
    ("d.mkv", "matroska", "libx264", "aac", 44100, 0.01),
    ("e.mkv", "matroska", "ffv1", "pcm_s16le", 8000, 1e-3),
    ("f.mkv", "matroska", "libvpx", "flac", 96000, 1e-3),
    ("g.webm", "webm", "libvpx-vp9", "libopus", 48000, 0.02),
    ("h.webm", "webm", "libvpx", "libopus", 48000, 0.02),
    ("i.m4a", "ipod", None, "aac", 44100, 0.01),
    ("j.m4a", "ipod", None, "alac", 44100, 1e-3),
    ("k.mp3", "mp3", None, "libmp3lame", 44100, 0.07),  # LAME scales by 0.95
    ("l.ogg", "ogg", None, "libopus", 48000, 0.02),
    ("m.flac", "flac", None, "flac", 44100, 1e-3),
    ("n.wav", "wav", None, "pcm_s24le", 22050, 1e-3),
]


@pytest.mark.parametrize(("name", "container", "video", "audio", "rate", "tolerance"), MADE, ids=[m[0] for m in MADE])
def test_containers_and_codecs(tmp_path, name, container, video, audio, rate, tolerance):
    for codec in filter(None, (video, audio)):
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV has no {codec} encoder")
    path = write_media(tmp_path / name, container, video, audio, rate=rate)
    info = probe(path)
    assert info.kind == ("video" if video else "audio")
    assert (info.path, info.has_audio, info.has_video) == (str(path), True, video is not None)
    assert info.duration == pytest.approx(3.0, abs=0.06)
    assert (info.sampling_rate, info.channels) == (rate, 2)
    assert (info.width, info.height) == (SIZE if video else (None, None))
    waveform = load_audio(path)
    assert waveform.dtype == np.float32 and len(waveform) == pytest.approx(48000, abs=400)
    assert tone_error(waveform) < tolerance
    excerpt = load_audio(path, start=1.25, duration=0.5)
    assert excerpt.shape == (8000,)
    np.testing.assert_allclose(excerpt, waveform[20000:28000], rtol=0, atol=1e-5)
    if video:
        # frame n is shown from n / 25 s until the next
        times = [0.0, 2.96, 0.04, 0.5, 1.03, 1.039, 2.2]
        assert [number(image) for image in load_frames(path, times)] == [0, 74, 1, 12, 25, 25, 55]


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.wav", {"subtype": "PCM_16"}, 1e-3),
        ("a.wav", {"subtype": "PCM_U8"}, 0.02),
        ("a.wav", {"subtype": "FLOAT"}, 1e-3),
        ("a.flac", {"subtype": "PCM_24"}, 1e-3),
        ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}, 0.05),
        ("a.mp3", {"format": "MP3"}, 0.07),
        ("a.aiff", {"subtype": "PCM_16"}, 1e-3),
    ],
)
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (44100, 2)])
def test_plain_audio(tmp_path, name, options, tolerance, rate, channels):
    path = tmp_path / name
    soundfile.write(path, tone(2.0, rate, channels), rate, **options)
    assert probe(path).duration == pytest.approx(2.0, abs=0.06)
    waveform = load_audio(path)
    assert len(waveform) == pytest.approx(32000, abs=2)
    assert tone_error(waveform) < tolerance


def test_eight_channels_at_96_khz_are_averaged_and_resampled(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.5, 96000, 8), 96000, subtype="FLOAT")
    assert probe(tmp_path / "a.wav").channels == 8
    waveform = load_audio(tmp_path / "a.wav")
    assert waveform.shape == (24000,)
    assert tone_error(waveform) < 1e-3
    assert load_audio(tmp_path / "a.wav", sampling_rate=22050).shape == (33075,)


def test_excerpt_is_a_slice_of_the_whole(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal((44100 * 15, 2))
    soundfile.write(tmp_path / "a.wav", noise, 44100, subtype="FLOAT")
    whole = load_audio(tmp_path / "a.wav")
    assert whole.shape == (240000,)
    for start, duration in ((0.0, 1.0), (0.3, 0.7), (4.05, 2.5), (12.125, 0.1), (14.5, 3.0)):
        first = round(start * 16000)
        excerpt = load_audio(tmp_path / "a.wav", start=start, duration=duration)
        expected = whole[first : first + round(duration * 16000)]
        assert excerpt.shape == expected.shape
        np.testing.assert_allclose(excerpt, expected, rtol=0, atol=1e-6)
    # a file at the target rate is not resampled
    soundfile.write(tmp_path / "b.wav", noise[:32000], 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "b.wav"), noise[:32000].mean(axis=1), rtol=0, atol=1e-7)


def test_excerpt_far_into_a_container_is_sought(tmp_path):
    path = write_media(tmp_path / "a.mp4", "mp4", None, "aac", seconds=30.0)
    excerpt = load_audio(path, start=25.5, duration=1.0)
    assert tone_error(excerpt, start=25.5) < 0.01


def test_sound_that_starts_later_than_the_picture_keeps_its_place(tmp_path):
    path = write_media(tmp_path / "a.mkv", "matroska", "libx264", "pcm_s16le", rate=16000, delay=0.5)
    waveform = load_audio(path)
    assert np.abs(waveform[:7990]).max() == 0
    assert tone_error(waveform[8000:]) < 1e-3


def test_content_counts_and_not_the_extension(tmp_path):
    video = write_media(tmp_path / "video.wav", "mp4", "libx264", "aac")
    assert probe(video).kind == "video" and number(load_frames(video, 1.0)[0]) == 25
    soundfile.write(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    sound = (tmp_path / "a.wav").rename(tmp_path / "sound.png")
    assert probe(sound).kind == "audio" and load_audio(sound).shape == (16000,)
    Image.new("RGB", (8, 6)).save(tmp_path / "image.mp4", format="PNG")
    assert probe(tmp_path / "image.mp4").kind == "image"
    # FFmpeg would open the files that a playlist names
    (tmp_path / "list.wav").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nvideo.wav\n#EXT-X-ENDLIST\n")
    assert "is not a readable audio" in message(lambda: load_audio(tmp_path / "list.wav"))


def test_bytes_file_objects_and_dataset_rows(tmp_path):
    path = write_media(tmp_path / "a.mp4", "mp4", "libx264", "aac")
    data, expected = path.read_bytes(), load_audio(path)
    for source in (
        str(path),
        data,
        io.BytesIO(data),
        {"path": None, "bytes": data},
        {"path": str(path), "bytes": None},
    ):
        np.testing.assert_array_equal(load_audio(source), expected)
    assert number(load_frames(data, 1.0)[0]) == 25
    assert message(lambda: load_audio({"path": "row.flac", "bytes": b"no sound"})).startswith("row.flac: ")


def test_cover_art_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp3"), "w") as output:
        sound = output.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = output.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        output.mux(cover.encode(frame))
        output.mux(cover.encode(None))
        samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone(1.0, 44100).T), format="fltp", layout="mono")
        samples.sample_rate = 44100
        output.mux(sound.encode(samples))
        output.mux(sound.encode(None))
    info = probe(tmp_path / "a.mp3")
    assert (info.kind, info.has_audio, info.has_video) == ("audio", True, False)
    assert tone_error(load_audio(tmp_path / "a.mp3")) < 0.07
    assert "contains sound only" in message(lambda: load_frames(tmp_path / "a.mp3", 0.0))


@pytest.mark.parametrize("gop", [1, 5, 250])
@pytest.mark.parametrize(("name", "container"), [("a.mp4", "mp4"), ("a.mkv", "matroska"), ("a.webm", "webm")])
def test_every_frame_by_its_time(tmp_path, name, container, gop):
    codec = "libvpx" if container == "webm" else "libx264"
    path = write_media(tmp_path / name, container, codec, gop=gop)
    order = np.random.default_rng(0).permutation(75)
    times = [(index + 0.5) / FRAME_RATE for index in order]
    assert [number(image) for image in load_frames(path, times)] == order.tolist()
    for index in (74, 0, 40):
        image = load_frames(path, index / FRAME_RATE)[0]
        assert number(image) == index and image.mode == "RGB" and image.size == SIZE


def test_last_frame_stays_until_the_end(tmp_path):
    path = write_media(tmp_path / "a.mp4", "mp4", "libx264")
    assert number(load_frames(path, 3.0)[0]) == 74


@pytest.fixture
def decoded(monkeypatch) -> list[float]:
    """Record the times of the frames that are decoded."""
    times = []
    original = frames.decode

    def counting(container, stream, is_wanted=None):
        for frame in original(container, stream, is_wanted):
            times.append(frame.time)
            yield frame

    monkeypatch.setattr(frames, "decode", counting)
    return times


def test_sparse_frames_are_sought(tmp_path, decoded):
    """Two frames of a video with eight groups of pictures: the other groups are not decoded."""
    path = write_media(tmp_path / "a.mp4", "mp4", "libx264", seconds=8.0, gop=25)
    assert [number(image) for image in load_frames(path, [1.0, 6.5])] == [25, 162]
    assert len(decoded) < 60


def test_a_keyframe_shown_just_after_the_time_is_not_sought(tmp_path, decoded):
    """The index lists keyframes in decoding order, some frames before they are shown."""
    path = write_media(tmp_path / "a.mp4", "mp4", "libx264", seconds=4.0, gop=50)
    with av.open(str(path)) as container:
        entries = container.streams.video[0].index_entries
        second = [
            float(entry.timestamp * container.streams.video[0].time_base) for entry in entries if entry.is_keyframe
        ][1]
    assert second == pytest.approx(0.56)  # and it is shown at 0.64
    assert [number(image) for image in load_frames(path, [0.3, 0.6])] == [7, 15]
    assert decoded == sorted(decoded)


def test_frames_that_no_other_refers_to_are_passed_over(tmp_path, decoded):
    path = write_media(tmp_path / "a.mp4", "mp4", "libx264", seconds=8.0, gop=1000)
    seconds = [float(second) for second in range(8)]
    assert [number(image) for image in load_frames(path, seconds)] == [25 * second for second in range(8)]
    assert len(decoded) < 130  # of 176 up to the last


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frames_far_apart_are_not_passed_over(tmp_path, decoded, container):
    """One frame every 0.6 s, most of them unreferenced: each is shown until the next."""
    with av.open(str(tmp_path / "a"), "w", format=container) as output:
        stream = output.add_stream("libx264", rate=FRAME_RATE)
        (stream.width, stream.height), stream.pix_fmt, stream.gop_size = SIZE, "yuv420p", 1000
        for index in range(30):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = 15 * index, Fraction(1, FRAME_RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    times = [0.61, 1.1, 3.5, 3.7, 9.55, 16.9]
    assert [number(image) for image in load_frames(tmp_path / "a", times)] == [1, 1, 5, 6, 15, 28]


@pytest.mark.parametrize("rotation", [0, 90])
def test_frames_are_shrunk_and_never_enlarged(tmp_path, rotation):
    path = write_media(tmp_path / "a.mp4", "mp4", "libx264", rotation=rotation)
    turned = SIZE[::-1] if rotation else SIZE
    for side, size in ((24, (32, 24)), (48, SIZE), (100, SIZE)):
        (image,) = load_frames(path, 1.0, shorter_side=side)
        assert image.size == (size[::-1] if rotation else size)
        whole = load_frames(path, 1.0)[0]
        assert whole.size == turned
        expected = np.asarray(whole.resize(image.size, Image.Resampling.BOX), float)
        # chroma is scaled from its stored half resolution
        assert np.abs(np.asarray(image, float) - expected).mean() < (4 if side == 24 else 1e-9)


def test_rotation_of_the_display_matrix(tmp_path):
    path = write_media(tmp_path / "a.mp4", "mp4", "libx264", rotation=90)
    image = load_frames(path, 1.0)[0]
    assert image.size == (SIZE[1], SIZE[0])
    assert number(image.rotate(-90, expand=True)) == 25


def test_bad_files(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("This is not sound.\n" * 100)
    (tmp_path / "text.mp4").write_text("This is not video.\n" * 100)
    soundfile.write(tmp_path / "zero.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", tone(0.05, 16000), 16000)
    soundfile.write(tmp_path / "good.wav", tone(1.0, 16000), 16000)
    Image.new("RGB", (8, 6)).save(tmp_path / "image.png")
    write_media(tmp_path / "mute.mp4", "mp4", "libx264")
    for name, part in {
        "missing.wav": "no such file",
        "": "is a directory",
        "empty.wav": "is empty",
        "text.wav": "is not a readable audio",
        "text.mp4": "is not a readable audio",
        "zero.wav": "contains no sound (zero length)",
        "nan.wav": "contains NaN or infinite samples",
        "short.wav": "0.050 s of sound is too short; give at least 0.1 s",
        "image.png": "is a still image, without sound",
        "mute.mp4": "is a video without sound",
    }.items():
        path = tmp_path / name
        line = message(lambda path=path: load_audio(path))
        assert line.startswith(f"{path}: {part}") and ";" in line, line
    for call, part in (
        (lambda: load_frames(tmp_path / "good.wav", 0.0), "contains sound only"),
        (lambda: load_frames(tmp_path / "image.png", 0.0), "is a still image, not a video"),
        (lambda: load_frames(tmp_path / "mute.mp4", 3.5), "time 3.5 s is outside the video, which lasts 3.000 s"),
        (lambda: load_frames(tmp_path / "mute.mp4", [0.0, -0.1]), "time -0.1 s is outside the video"),
        (lambda: load_image(tmp_path / "good.wav"), "is audio, not a still image"),
        (lambda: load_image(tmp_path / "mute.mp4"), "is video, not a still image"),
        (lambda: load_image(tmp_path / "text.wav"), "is not a readable audio"),
        (lambda: load_audio(tmp_path / "good.wav", start=2.0), "start=2 s is outside the sound"),
        (lambda: load_audio(tmp_path / "good.wav", start=0.95), "0.050 s of sound is too short"),
        (lambda: load_audio(tmp_path / "good.wav", start=-1.0), "start=-1.0"),
        (lambda: load_audio(tmp_path / "good.wav", duration=0.0), "start=0.0, duration=0.0"),
        (lambda: probe(tmp_path / "text.wav"), "is not a readable audio"),
    ):
        assert f": {part}" in message(call)


@pytest.mark.parametrize(
    ("name", "container", "video", "audio", "movflags", "audible", "visible"),
    [
        ("a.mp4", "mp4", "libx264", "aac", None, "is not a readable audio", "is not a readable audio"),
        ("b.mp4", "mp4", "libx264", "aac", "faststart", "is cut off at", "is cut off at"),
        ("c.mkv", "matroska", "libx264", "aac", None, "is cut off at", "is cut off at"),
        ("d.webm", "webm", "libvpx", "libopus", None, "is cut off at", "is cut off at"),
        ("e.flac", "flac", None, "flac", None, "is damaged", "contains sound only"),
    ],
)
def test_files_cut_in_the_middle(tmp_path, capfd, name, container, video, audio, movflags, audible, visible):
    path = write_media(tmp_path / name, container, video, audio, rate=48000, movflags=movflags)
    os.truncate(path, int(0.6 * path.stat().st_size))
    capfd.readouterr()
    assert f"{name}: {audible}" in message(lambda: load_audio(path))
    assert f"{name}: {visible}" in message(lambda: load_frames(path, 2.5))
    if audible == "is cut off at":  # the part before the cut can be read
        assert tone_error(load_audio(path, start=0.5, duration=0.5), start=0.5) < 0.02
        assert number(load_frames(path, 0.5)[0]) == 12
    # libav and libsndfile print nothing
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "size", "duration"),
    [("00W1lcxW-WU_40.000.mp4", (256, 144), 10.0), ("KlsG1EnBEjc_000361.mp4", (1280, 720), 10.037)],
)
def test_real_clips(name, size, duration, shared_data):
    path = shared_data / "clips" / name
    info = probe(path)
    assert (info.kind, info.has_audio, info.has_video) == ("video", True, True)
    assert (info.width, info.height) == size and info.duration == pytest.approx(duration)
    waveform = load_audio(path)
    assert len(waveform) / 16000 == pytest.approx(duration, abs=0.05)
    np.testing.assert_allclose(load_audio(path, start=3.0, duration=2.0), waveform[48000:80000], rtol=0, atol=1e-5)
    expected = dict.fromkeys((0.0, 0.02, 4.999, 9.9))
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            expected |= {time: frame for time in expected if frame.time <= time + 1e-6}
    for image, frame in zip(load_frames(path, list(expected)), expected.values(), strict=True):
        np.testing.assert_array_equal(np.asarray(image), frame.to_ndarray(format="rgb24"))
