"""Preparation of a clip: its samples, its frames, and every reason for leaving it out."""

import io
import json
import os
import re
import shutil

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from dali_llava.processing.shards.clip import ClipSettings, Dropped, PreparedClip, clip_key, prepare_clip


SETTINGS = ClipSettings()
SOUND_ONLY = ClipSettings(require=("audio",))
# name, container, video codec, audio codec
MADE = [
    ("a.flac", "flac", None, "flac"),
    ("a.ogg", "ogg", None, "libopus"),
    ("a.mp3", "mp3", None, "libmp3lame"),
    ("a.m4a", "ipod", None, "aac"),
    ("a.mp4", "mp4", "libx264", "aac"),
    ("a.mkv", "matroska", "libx264", "aac"),
    ("a.webm", "webm", "libvpx", "libopus"),
]


def samples_of(clip: PreparedClip) -> np.ndarray:
    """Return the 16-bit samples of the FLAC file of a clip."""
    samples, rate = soundfile.read(io.BytesIO(clip.files["flac"]), dtype="int16")
    assert rate == 16_000 and samples.ndim == 1
    return samples


def frames_of(clip: PreparedClip) -> list[Image.Image]:
    names = [name for name in clip.files if name.endswith(".jpg")]
    assert names == [f"{number}.jpg" for number in range(len(names))]
    return [Image.open(io.BytesIO(clip.files[name])) for name in names]


@pytest.mark.parametrize(("start", "end"), [(0.0, None), (0.0, 1.0), (0.5, 2.25), (2.0, 5.0), (3.0001, 4.9999)])
def test_a_cut_is_exact_to_the_sample(made, tmp_path, start, end):
    ramp = np.arange(-40_000, 40_000).astype(np.int16)  # 5 s; the value of a sample is its index, modulo 65536
    soundfile.write(tmp_path / "ramp.wav", ramp, 16_000, subtype="PCM_16")
    clip = prepare_clip(made["make_row"]("ramp", tmp_path / "ramp.wav", start=start, end=end), SOUND_ONLY)
    first, last = (
        round(16_000 * start),
        80_000 if end is None else round(16_000 * start) + round(16_000 * (end - start)),
    )
    np.testing.assert_array_equal(samples_of(clip), ramp[first:last])
    assert clip.seconds == (last - first) / 16_000


@pytest.mark.parametrize(("name", "container", "video", "audio"), MADE)
def test_a_cut_of_every_container_keeps_its_place(made, tmp_path, name, container, video, audio):
    for codec in filter(None, (video, audio)):
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV has no {codec} encoder")
    path = made["write_clip"](tmp_path / name, container, video, audio)
    row = made["make_row"]("a", path, (path,) if video else (), start=2.0, end=7.5)
    clip = prepare_clip(row, SETTINGS if video else SOUND_ONLY)
    expected, samples = made["noise"](11.0)[32_000:120_000], samples_of(clip) / 32768
    assert len(samples) == len(expected)
    correlation = np.fft.irfft(np.fft.rfft(samples) * np.fft.rfft(expected).conj())
    lag = int(correlation.argmax())
    assert min(lag, len(samples) - lag) <= 2  # samples, 0.125 ms
    assert correlation.max() > 0.9 * np.linalg.norm(samples) * np.linalg.norm(expected)
    if video:
        greys = [np.asarray(frame.convert("L"), float).mean() for frame in frames_of(clip)]
        np.testing.assert_allclose(greys, [made["grey_of"](second) for second in range(2, 8)], atol=4)


def test_ten_frames_are_the_first_of_each_second(made, tmp_path):
    path = made["write_clip"](tmp_path / "a.mp4", "mp4", "libx264", "aac", seconds=13.0)
    for frames, start, seconds in ((10, 0.0, range(10)), (10, 4.0, range(4, 13)), (3, 1.0, range(1, 4))):
        clip = prepare_clip(made["make_row"]("a", path, (path,), start=start), ClipSettings(frames=frames))
        greys = [np.asarray(frame.convert("L"), float).mean() for frame in frames_of(clip)]
        np.testing.assert_allclose(greys, [made["grey_of"](second) for second in seconds], atol=4)


def test_frames_shrink_to_the_size_and_never_grow(made, tmp_path):
    path = made["write_clip"](tmp_path / "a.mp4", "mp4", "libx264", "aac", seconds=2.0, size=(160, 90))
    for size, expected in ((336, (160, 90)), (90, (160, 90)), (45, (80, 45)), (32, (57, 32))):
        clip = prepare_clip(made["make_row"]("a", path, (path,)), ClipSettings(frame_size=size))
        assert {frame.size for frame in frames_of(clip)} == {expected}


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("end", [None, 6.0])
def test_tracks_of_unequal_length_are_kept(made, tmp_path, container, end):
    still = made["write_clip"](tmp_path / "still", container, "libx264", "aac", 0.2, sound=made["noise"](6.0))
    clip = prepare_clip(made["make_row"]("a", still, (still,), end=end), SETTINGS)
    assert isinstance(clip, PreparedClip) and clip.seconds == pytest.approx(6.0, abs=0.07)
    assert np.asarray(frames_of(clip)[0].convert("L"), float).mean() == pytest.approx(made["grey_of"](0), abs=4)
    assert len(frames_of(clip)) == 1

    silent_end = made["write_clip"](tmp_path / "end", container, "libx264", "aac", 6.0, sound=made["noise"](2.0))
    clip = prepare_clip(made["make_row"]("a", silent_end, (silent_end,), end=end), SETTINGS)
    assert isinstance(clip, PreparedClip) and clip.seconds == pytest.approx(2.0, abs=0.07)
    greys = [np.asarray(frame.convert("L"), float).mean() for frame in frames_of(clip)]
    np.testing.assert_allclose(greys, [made["grey_of"](second) for second in range(6)], atol=4)


def test_listed_pictures_come_in_their_order(made, tmp_path):
    soundfile.write(tmp_path / "a.wav", made["noise"](3.0), 16_000)
    pictures = []
    for number in range(3):
        pictures.append(tmp_path / f"{number}.jpg")
        Image.new("RGB", (40, 30), (50 * number,) * 3).save(pictures[-1])
    row = made["make_row"]("a", tmp_path / "a.wav", tuple(pictures))
    for count in (2, 10):
        clip = prepare_clip(row, ClipSettings(frames=count))
        greys = [np.asarray(frame.convert("L"), float).mean() for frame in frames_of(clip)]
        np.testing.assert_allclose(greys, [0, 50, 100][:count], atol=2)


def test_the_json_has_the_true_id_and_the_place_in_the_source(made, tmp_path):
    soundfile.write(tmp_path / "a.wav", made["noise"](3.0), 16_000)
    row = made["make_row"]("dir/ä.wav", tmp_path / "a.wav", start=0.5, end=2.5, captions=["ein Hund bellt, süß"])
    clip = prepare_clip(row, SOUND_ONLY)
    assert json.loads(clip.files["json"]) == {
        "id": "dir/ä.wav",
        "captions": ["ein Hund bellt, süß"],
        "labels": ["noise"],
        "start": 0.5,
        "end": 2.5,
        "source": "made",
    }
    assert clip.key == clip_key("dir/ä.wav")


def test_an_id_that_is_no_unicode_keeps_its_bytes(made, tmp_path):
    """File names in Latin-1 are read from a folder with surrogate escapes."""
    soundfile.write(tmp_path / "a.wav", made["noise"](3.0), 16_000)
    name = b"h\xf6ren".decode(errors="surrogateescape")
    clip = prepare_clip(made["make_row"](name, tmp_path / "a.wav"), SOUND_ONLY)
    assert json.loads(clip.files["json"])["id"] == name and clip.key.startswith("h_ren=")


def test_keys_are_safe_and_differ():
    names = ["plain-1_B", "-0049e", "a.b", "a/b", "a_b", "a b", "ä", "", ".", "..", "/", "x" * 60, "x" * 61, "x" * 300]
    names += [clip_key(name) for name in names]
    keys = {name: clip_key(name) for name in names}
    assert len(set(keys.values())) == len(set(names))
    assert all(re.fullmatch(r"[A-Za-z0-9_=-]{1,80}", key) for key in keys.values())
    assert keys["plain-1_B"] == "plain-1_B" and keys["-0049e"] == "-0049e"


@pytest.fixture
def bad_row(made, tmp_path):
    """Make the row of a clip with the named fault."""

    def write(fault: str) -> dict:
        path = tmp_path / f"{fault}.mp4"
        fields = {}
        if fault == "empty":
            path.touch()
        elif fault == "text":
            path.write_text("This is no video.\n" * 100)
        elif fault in ("truncated", "cut_off"):
            made["write_clip"](path, "mp4" if fault == "truncated" else "matroska", "libx264", "aac", seconds=4.0)
            os.truncate(path, int(0.6 * path.stat().st_size))
        elif fault == "no_sound_track":
            made["write_clip"](path, "mp4", "libx264", None, seconds=3.0)
        elif fault == "zero_length":
            soundfile.write(tmp_path / "zero.wav", np.zeros(0), 16_000)
            path = (tmp_path / "zero.wav").rename(path)
        elif fault == "no_video_track":
            made["write_clip"](path, "mp4", None, "aac", seconds=3.0)
        elif fault == "silent":
            made["write_clip"](path, "mp4", "libx264", "aac", 3.0, sound=np.zeros(48_000, np.float32))
        elif fault == "frozen":
            made["write_clip"](path, "mp4", "libx264", "aac", seconds=3.0, still=True)
        elif fault == "short":
            made["write_clip"](path, "mp4", "libx264", "aac", seconds=0.6)
        elif fault == "nan":
            samples = np.full(48_000, 0.1, np.float32)
            samples[9_000] = np.nan
            soundfile.write(tmp_path / "nan.wav", samples, 16_000, subtype="FLOAT")
            path = (tmp_path / "nan.wav").rename(path)
        elif fault == "directory":
            path.mkdir()
        elif fault == "outside":
            made["write_clip"](path, "mp4", "libx264", "aac", seconds=3.0)
            fields = {"start": 30.0, "end": 40.0}
        return made["make_row"](fault, path, (path,), **fields)

    return write


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("missing", "missing", "no such file"),
        ("empty", "broken", "is empty"),
        ("text", "broken", "is not a readable audio"),
        ("truncated", "broken", "is not a readable audio"),
        ("cut_off", "broken", "is cut off at"),
        ("directory", "broken", "is a directory"),
        ("nan", "broken", "NaN"),
        ("no_sound_track", "no_sound", "without sound"),
        ("zero_length", "no_sound", "contains no sound (zero length)"),
        ("no_video_track", "no_picture", "contains sound only"),
        ("silent", "silent", "its peak of 0.00"),
        ("frozen", "frozen", "3 frames"),
        ("short", "too_short", "s of sound, less than 1 s"),
        ("outside", "too_short", "outside the sound"),
    ],
)
def test_a_bad_clip_is_left_out_for_its_reason(bad_row, fault, reason, detail):
    dropped = prepare_clip(bad_row(fault), SETTINGS)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason) == (fault, reason)
    assert detail in dropped.detail and "\n" not in dropped.detail


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        ("silent", ClipSettings(keep_silent=True)),
        ("frozen", ClipSettings(keep_frozen=True)),
        ("frozen", ClipSettings(frames=1)),
        ("short", ClipSettings(min_seconds=0.5)),
        ("no_sound_track", ClipSettings(require=("frames",))),
        ("no_video_track", ClipSettings(require=("audio",))),
    ],
)
def test_what_a_setting_keeps(bad_row, fault, settings):
    clip = prepare_clip(bad_row(fault), settings)
    assert isinstance(clip, PreparedClip)
    assert ("flac" in clip.files) == (fault != "no_sound_track")
    assert ("0.jpg" in clip.files) == (fault != "no_video_track")


def test_a_row_without_media(made, tmp_path):
    row = made["make_row"]("a")
    assert prepare_clip(row, SETTINGS).reason == "missing"
    assert prepare_clip(row, ClipSettings(require=())).reason == "missing"
    soundfile.write(tmp_path / "a.wav", made["noise"](2.0), 16_000)
    assert prepare_clip(made["make_row"]("a", tmp_path / "a.wav"), SETTINGS).reason == "no_picture"
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    row = made["make_row"]("a", None, (tmp_path / "a.png",))
    assert prepare_clip(row, SETTINGS).reason == "missing"
    assert list(prepare_clip(row, ClipSettings(require=())).files) == ["0.jpg", "json"]
    row = made["make_row"]("a", tmp_path / "a.wav", (tmp_path / "gone.png",))
    assert prepare_clip(row, SETTINGS) == Dropped("a", "missing", f"{tmp_path / 'gone.png'}: no such file")


def test_a_wrong_extension_is_no_fault(made, tmp_path):
    made["write_clip"](tmp_path / "a.mp4", "mp4", "libx264", "aac", seconds=3.0)
    shutil.move(tmp_path / "a.mp4", tmp_path / "a.wav")
    clip = prepare_clip(made["make_row"]("a", tmp_path / "a.wav", (tmp_path / "a.wav",)), SETTINGS)
    assert [*clip.files] == ["flac", "0.jpg", "1.jpg", "2.jpg", "json"]


def test_bytes_in_place_of_a_path(made, tmp_path):
    path = made["write_clip"](tmp_path / "a.mp4", "mp4", "libx264", "aac", seconds=3.0)
    row = made["make_row"]("a", path, (path,))
    held = {"path": "elsewhere.mp4", "bytes": path.read_bytes()}
    assert prepare_clip(row | {"audio": held, "frames": [held]}, SETTINGS) == prepare_clip(row, SETTINGS)


def test_what_no_one_foresaw_leaves_out_one_clip(made, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", made["noise"](2.0), 16_000)

    def fail(*args):
        raise MemoryError("a header\nof 2**60 samples")

    for function in ("_sound", "_flac"):
        with monkeypatch.context() as patched:
            patched.setitem(prepare_clip.__globals__, function, fail)
            dropped = prepare_clip(made["make_row"]("a", tmp_path / "a.wav"), SOUND_ONLY)
        assert dropped == Dropped("a", "broken", "MemoryError: a header of 2**60 samples")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 0}, "frames must be between 1 and 1000, not 0"),
        ({"quality": 100}, "quality must be between 1 and 95"),
        ({"frame_size": 0}, "frame_size must be between"),
        ({"silence": -1.0}, "silence must be between 0 and 1"),
        ({"min_seconds": 0.0}, "min_seconds must be at least 0.1"),
        ({"require": ("video",)}, "require: unknown 'video'; choose from audio, frames"),
    ],
)
def test_settings_outside_their_range(fields, message):
    with pytest.raises(ValueError, match=message):
        ClipSettings(**fields)


@pytest.mark.parametrize("name", ["00W1lcxW-WU_40.000.mp4", "KlsG1EnBEjc_000361.mp4"])
def test_real_clips(made, shared_data, name):
    path = shared_data / "clips" / name
    clip = prepare_clip(made["make_row"](name, path, (path,), end=10.0), SETTINGS)
    frames = frames_of(clip)
    assert clip.seconds == pytest.approx(10.0, abs=0.05) and len(frames) == 10
    side = {"00W1lcxW-WU_40.000.mp4": 144, "KlsG1EnBEjc_000361.mp4": 336}[name]
    assert {min(frame.size) for frame in frames} == {side}
    cut = prepare_clip(made["make_row"](name, path, (path,), start=3.0, end=6.0), SETTINGS)
    np.testing.assert_allclose(samples_of(cut), samples_of(clip)[48_000:96_000], atol=1)
    # the same second of the same video gives the same JPEG
    for one, other in zip(frames_of(cut), frames[3:6], strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
