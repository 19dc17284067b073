"""`dali-llava caption`: its output for good files, and the one-line error for each kind of bad input."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from safetensors.torch import load_file, save_file

from dali_llava.cli import main
from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import SEE_PROMPT, SOUND_PROMPT, LlavaAudioProcessor
from dali_llava.processing.media import load_audio, load_frames, probe


@pytest.fixture
def caption(tiny_model_dir, capsys):
    """Run `caption` on the tiny model; return (exit code, lines of stdout, lines of stderr)."""

    def run(*arguments: str | Path, model: str | Path = tiny_model_dir):
        argv = ["caption", str(model), *map(str, arguments), "--max-new-tokens", "6", "--device", "cpu"]
        code = main(argv)
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def bad_file(tmp_path, media_dir):
    """Write a bad input by name."""

    def write(name: str) -> Path:
        path = tmp_path / name
        if name == "empty.wav":
            path.touch()
        elif name == "text.wav":
            path.write_text("This is no sound at all.\n" * 100)
        elif name == "zero.wav":
            soundfile.write(path, np.zeros(0, dtype=np.float32), 16_000)
        elif name == "nan.wav":
            samples = np.full(16_000, 0.1, dtype=np.float32)
            samples[8_000] = np.nan
            soundfile.write(path, samples, 16_000, subtype="FLOAT")
        elif name == "short.wav":
            soundfile.write(path, np.full(800, 0.1, dtype=np.float32), 16_000)
        elif name == "cut.mp4":
            whole = (media_dir / "clip.mp4").read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        elif name == "folder":
            path.mkdir()
        elif name == "cut.jpg":
            whole = (media_dir / "photo.jpg").read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        return path

    return write


def test_each_kind_of_file_is_captioned_from_what_it_holds(caption, media_dir):
    files = [media_dir / name for name in ("bark.wav", "clip.mp4", "silent.mp4", "photo.jpg", "long.flac")]
    code, out, err = caption(*files, "--json")
    rows = [json.loads(line) for line in out]
    assert (code, err) == (0, [])
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [row["modality"] for row in rows] == ["audio", "audiovisual", "image", "image", "audio"]
    for row in rows:
        assert list(row) == ["file", "modality", "caption", "seconds"]
        assert isinstance(row["caption"], str)
        assert row["seconds"] >= 0


def test_plain_output_is_file_tab_caption(caption, media_dir):
    files = [media_dir / "bark.wav", media_dir / "photo.jpg"]
    _, in_json, _ = caption(*files, "--json")
    code, out, err = caption(*files)
    assert (code, err) == (0, [])
    assert out == [f"{row['file']}\t{row['caption']}" for row in map(json.loads, in_json)]


def test_batches_do_not_change_captions(caption, media_dir):
    files = [media_dir / name for name in ("photo.jpg", "clip.mp4", "bark.wav", "silent.mp4")]
    assert caption(*files, "--batch-size", "1")[1] == caption(*files, "--batch-size", "4")[1]


@pytest.mark.parametrize("modality", ["audio", "image", "audiovisual"])
def test_a_video_is_captioned_from_what_is_asked(caption, media_dir, modality):
    code, out, _ = caption(media_dir / "clip.mp4", "--modality", modality, "--json")
    assert code == 0
    assert json.loads(out[0])["modality"] == modality


def test_modality_prompt_and_prefix_reach_the_model(caption, media_dir):
    clip = media_dir / "clip.mp4"
    options = [
        [],
        ["--modality", "audio"],
        ["--modality", "image"],
        ["--modality", "audio", "--no-prefix"],
        ["--modality", "image", "--prefix"],
        ["--prompt", "What sound ?"],
    ]
    captions = [tuple(caption(clip, *option)[1]) for option in options]
    assert len(set(captions)) >= 5  # random weights may give one equal pair by chance


def test_prefix_is_the_checkpoints_by_default(caption, media_dir, tiny_model_dir, tmp_path):
    """A distilled checkpoint uses no prefix for sound alone. The option takes precedence."""
    distilled = shutil.copytree(tiny_model_dir, tmp_path / "distilled")
    config = json.loads((distilled / "config.json").read_text())
    (distilled / "config.json").write_text(json.dumps(config | {"prefix_modalities": ["audiovisual"]}))
    clip = media_dir / "clip.mp4"

    def said(model: Path, *options: str) -> str:
        return caption(clip, *options, model=model)[1][0]

    for modality in ("audio", "audiovisual"):
        with_prefix, without = (
            said(tiny_model_dir, "--modality", modality, option) for option in ("--prefix", "--no-prefix")
        )
        assert with_prefix != without
        assert said(tiny_model_dir, "--modality", modality) == with_prefix
        assert said(distilled, "--modality", modality) == (without if modality == "audio" else with_prefix)
        assert said(distilled, "--modality", modality, "--prefix") == with_prefix


def test_timestamps_cover_the_whole_file(caption, media_dir):
    code, out, err = caption(media_dir / "long.flac", "--timestamps", "--json")
    rows = [json.loads(line) for line in out]
    assert (code, err) == (0, [])
    # The window of the tiny model is 256 frames of 10 ms.
    assert [(row["start"], row["end"]) for row in rows] == [(0.0, 2.56), (2.56, 5.12), (5.12, 6.0)]
    _, plain, _ = caption(media_dir / "long.flac", "--timestamps")
    spans = ("0.00-2.56", "2.56-5.12", "5.12-6.00")
    assert plain == [
        f"{media_dir / 'long.flac'}\t{span}\t{row['caption']}" for span, row in zip(spans, rows, strict=True)
    ]


def test_a_window_gets_the_caption_of_its_sound_alone(caption, media_dir, tmp_path):
    samples, rate = soundfile.read(media_dir / "long.flac", dtype="float32")
    window = tmp_path / "window.wav"
    soundfile.write(window, samples[round(2.56 * rate) : round(5.17 * rate)], rate, subtype="FLOAT")
    _, windows, _ = caption(media_dir / "long.flac", "--timestamps", "--json")
    _, alone, _ = caption(window, "--json")
    assert json.loads(windows[1])["caption"] == json.loads(alone[0])["caption"]


def test_timestamps_of_a_picture_are_refused(caption, media_dir):
    code, out, err = caption(media_dir / "photo.jpg", "--timestamps")
    assert (code, out) == (1, [])
    assert err == [f"dali-llava: error: {media_dir / 'photo.jpg'}: a picture has no windows; leave out --timestamps"]


def test_many_channels_at_another_rate_are_fine(caption, media_dir, tmp_path):
    samples = np.random.default_rng(0).normal(scale=0.1, size=(96_000, 8)).astype(np.float32)
    soundfile.write(tmp_path / "eight.wav", samples, 96_000, subtype="FLOAT")
    code, out, err = caption(tmp_path / "eight.wav")
    assert (code, len(out), err) == (0, 1, [])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("missing.wav", [], "no such file; check the path"),
        ("empty.wav", [], "is empty; download or export it again"),
        ("text.wav", [], "not a readable audio, image or video file"),
        ("zero.wav", [], "contains no sound"),
        ("nan.wav", [], "NaN"),
        ("short.wav", [], "0.050 s of sound is too short; give at least 0.1 s"),
        ("cut.mp4", [], "download or export it again"),
        ("cut.jpg", [], "damaged"),
        ("folder", [], "is a directory without media files; give a media file"),
    ],
)
def test_a_bad_file_gets_one_line_and_the_others_go_on(caption, media_dir, bad_file, name, options, message):
    bad, good = bad_file(name), media_dir / "bark.wav"
    code, out, err = caption(good, bad, media_dir / "photo.jpg", *options, "--json")
    assert code == 1
    assert [json.loads(line)["file"] for line in out] == [str(good), str(media_dir / "photo.jpg")]
    assert len(err) == 1
    assert err[0].startswith(f"dali-llava: error: {bad}: ")
    assert message in err[0]


@pytest.mark.parametrize(
    ("name", "modality", "message"),
    [
        ("silent.mp4", "audio", "this video has no sound; use --modality image"),
        ("silent.mp4", "audiovisual", "this video has no sound; use --modality image"),
        ("photo.jpg", "audio", "this picture has no sound; use --modality image"),
        ("photo.jpg", "audiovisual", "this picture has no sound; use --modality image"),
        ("bark.wav", "image", "this sound file has no picture; use --modality audio"),
        ("bark.wav", "audiovisual", "this sound file has no picture; use --modality audio"),
    ],
)
def test_a_modality_that_a_file_lacks_is_named(caption, media_dir, name, modality, message):
    code, out, err = caption(media_dir / name, media_dir / "clip.mp4", "--modality", modality, "--json")
    assert code == 1
    assert [json.loads(line)["file"] for line in out] == [str(media_dir / "clip.mp4")]
    assert err == [f"dali-llava: error: {media_dir / name}: {message}"]


def copy_model(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_a_missing_model_is_told_before_any_media(caption, tmp_path):
    code, out, err = caption("missing.wav", model=tmp_path / "nothing")
    assert (code, out) == (1, [])
    assert err == [
        f"dali-llava: error: {tmp_path / 'nothing'}: no such model folder; "
        "`make quickstart` writes one to runs/quickstart/model"
    ]


def test_a_model_without_weights_is_told(caption, tiny_model_dir, tmp_path):
    model = copy_model(tiny_model_dir, tmp_path / "model")
    (model / "model.safetensors").unlink()
    code, out, err = caption("missing.wav", model=model)
    assert (code, out) == (1, [])
    assert err == [f"dali-llava: error: {model}: no weights (*.safetensors) in it; copy the whole folder again"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json in it; give a folder written by save_pretrained"),
        ("{", "config.json: not a JSON configuration; copy it again"),
        ("[]", "config.json: not a JSON configuration; copy it again"),
        ('{"model_type": "llava"}', "config.json: is a LLaVA without audio; run `dali-llava convert llava "),
        ('{"model_type": "clip"}', "config.json: model_type is 'clip', not 'llava_audio'; give a model of"),
        ("{}", "config.json: model_type is None, not 'llava_audio'; give a model of"),
    ],
)
def test_a_folder_of_something_else_is_told(caption, tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    code, out, err = caption("missing.wav", model=tmp_path)
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith(f"dali-llava: error: {tmp_path}") and message in err[0]


def test_weights_that_are_cut_off_are_told(caption, tiny_model_dir, tmp_path, media_dir):
    model = copy_model(tiny_model_dir, tmp_path / "model")
    os.truncate(model / "model.safetensors", 5_000)
    code, out, err = caption(media_dir / "bark.wav", model=model)
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith(f"dali-llava: error: {model}: cannot be loaded (")
    assert err[0].endswith("; copy or save the model again")


def test_weights_that_lack_a_tensor_are_told(caption, tiny_model_dir, tmp_path, media_dir):
    model = copy_model(tiny_model_dir, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    lost = sorted(name for name in tensors if "audio_tower" in name)[:2]
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    code, out, err = caption(media_dir / "bark.wav", model=model)
    assert (code, out, len(err)) == (1, [], 1)
    assert "2 weights are missing, the first is " in err[0]


def test_a_device_that_is_not_there_is_told(tiny_model_dir, media_dir, capsys):
    code = main(["caption", str(tiny_model_dir), str(media_dir / "bark.wav"), "--device", "cuda:99"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err == (
        "dali-llava: error: --device cuda:99: torch cannot use it here; --device cpu always works\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size", "0"],
        ["--num-beams", "-1"],
        ["--max-new-tokens", "x"],
        ["--modality", "video"],
        ["--dtype", "int8"],
    ],
)
def test_wrong_options_are_wrong_usage(options, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["caption", "model", "bark.wav", *options])
    assert exit_info.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_wrong_extension_does_not_matter(caption, media_dir, tmp_path):
    shutil.copy(media_dir / "clip.mp4", tmp_path / "clip.wav")
    shutil.copy(media_dir / "photo.jpg", tmp_path / "photo.mp4")
    code, out, err = caption(tmp_path / "clip.wav", tmp_path / "photo.mp4", "--json")
    assert (code, err) == (0, [])
    assert [json.loads(line)["modality"] for line in out] == ["audiovisual", "image"]


@pytest.mark.parametrize(("modality", "time"), [("audiovisual", 1.28), ("image", 1.5)])
def test_the_frame_is_the_one_in_the_middle(media_dir, monkeypatch, caption, modality, time):
    from dali_llava.processing.media import load

    asked = []

    def load_frames(path, times, shorter_side):
        asked.append((times, shorter_side))
        return [Image.new("RGB", (48, 48))]

    monkeypatch.setattr(load, "load_frames", load_frames)
    assert caption(media_dir / "clip.mp4", "--modality", modality)[0] == 0
    assert asked == [([pytest.approx(time, abs=0.05)], None)]


@pytest.fixture
def model_of_frames(tiny_model_dir, tmp_path) -> Path:
    """The tiny model with a processor that takes up to three frames, at most one per second."""
    folder = tmp_path / "model-of-frames"
    shutil.copytree(tiny_model_dir, folder)
    processor = LlavaAudioProcessor.from_pretrained(folder)
    processor.num_frames, processor.frame_rate = 3, 1.0
    processor.save_pretrained(folder)
    return folder


def test_a_model_of_several_frames_sees_the_whole_window(caption, model_of_frames, media_dir):
    """Its captions are those of the model for the frames at known times."""
    model = LlavaAudioForConditionalGeneration.from_pretrained(model_of_frames)
    processor = LlavaAudioProcessor.from_pretrained(model_of_frames)

    def expected(prompt: str, times: list[float], sound: np.ndarray | None = None) -> str:
        frames = load_frames(media_dir / "clip.mp4", times, shorter_side=48)
        text = processor.format_prompt(prompt, image=True, audio=sound is not None)
        inputs = processor(text=text, images=frames, audio=sound, return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 36 * len(times)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()

    path = media_dir / "clip.mp4"
    whole = expected(SOUND_PROMPT, [2.56 / 6, 1.28, 5 * 2.56 / 6], load_audio(path, duration=2.61))
    assert caption(path, model=model_of_frames) == (0, [f"{path}\t{whole}"], [])
    end = probe(path).duration
    parts = expected(SEE_PROMPT, [2.56 / 6, 1.28, 5 * 2.56 / 6]), expected(SEE_PROMPT, [(2.56 + end) / 2])
    code, out, err = caption(path, "--timestamps", "--modality", "image", model=model_of_frames)
    assert (code, err) == (0, [])
    assert [line.split("\t")[2] for line in out] == list(parts)


def test_real_clips_get_a_caption_each(caption, shared_data):
    clips = sorted((shared_data / "clips").glob("*.mp4"))
    dogs = sorted((shared_data / "esc10" / "001 - Dog bark").glob("*.ogg"))[:4]
    if not clips or not dogs:
        pytest.skip("no clips or no dog barks in the real recordings")
    code, out, err = caption(*clips, *dogs, "--json")
    rows = [json.loads(line) for line in out]
    assert (code, err) == (0, [])
    assert [row["file"] for row in rows] == [str(file) for file in [*clips, *dogs]]
    assert [row["modality"] for row in rows] == ["audiovisual"] * len(clips) + ["audio"] * len(dogs)
