"""`dali-llava merge`: a stage becomes one complete checkpoint, written completely or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dali_llava.cli import main
from dali_llava.cli.merge import merge_checkpoint
from dali_llava.modeling import LlavaAudioForConditionalGeneration


@pytest.fixture(scope="module")
def stage(tiny_model_dir, tiny_processor, tmp_path_factory):
    """A distilled stage on the tiny model, with its audio projector and no prefix for sound alone."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_model_dir, folder / "base")
    model = LlavaAudioForConditionalGeneration.from_pretrained(folder / "base")
    model.requires_grad_(False)
    model.model.audio_projector.requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.audio_projector.parameters():
            parameter.normal_(std=0.5, generator=generator)
    model.config.prefix_modalities = ["audiovisual"]
    model.save_stage(folder / "distilled", base=str(folder / "base"), stage="distill")
    tiny_processor.save_pretrained(folder / "distilled")
    return folder / "distilled"


def captions(model, media_dir, capsys, *options: str) -> list[str]:
    files = [str(media_dir / name) for name in ("bark.wav", "clip.mp4", "photo.jpg")]
    assert main(["caption", str(model), *files, "--max-new-tokens", "6", "--device", "cpu", *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_merged_checkpoint_stands_alone_and_gives_the_same_captions(stage, media_dir, tmp_path, capsys):
    staged = captions(stage, media_dir, capsys)
    moved = shutil.copytree(stage.parent, tmp_path / "run")
    assert main(["merge", str(moved / "distilled"), str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'merged'}\n"
    shutil.rmtree(moved)
    assert captions(tmp_path / "merged", media_dir, capsys) == staged
    # no prefix for sound alone, as the stage was trained
    assert captions(tmp_path / "merged", media_dir, capsys, "--no-prefix")[0] == staged[0]
    assert captions(tmp_path / "merged", media_dir, capsys, "--prefix")[0] != staged[0]


def test_the_merged_checkpoint_is_whole(stage, tmp_path, capsys):
    merge_checkpoint(stage, tmp_path / "deep" / "merged")
    names = {path.name for path in (tmp_path / "deep" / "merged").iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_llava_audio.py",
        "processing_llava_audio.py",
        "processor_config.json",
        "tokenizer.json",
    }
    assert not [name for name in names if name.startswith("stage.")]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["merged"]
    weights = load_file(tmp_path / "deep" / "merged" / "model.safetensors")
    expected = load_file(stage.parent / "base" / "model.safetensors") | load_file(stage / "stage.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    config = json.loads((tmp_path / "deep" / "merged" / "config.json").read_text())
    assert config["prefix_modalities"] == ["audiovisual"]


def test_an_existing_folder_is_not_touched(stage, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(["merge", str(stage), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"dali-llava: error: {tmp_path / 'out'}: already exists; choose another folder, or remove it first\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert main(["merge", str(stage), str(stage)]) == 1


def test_an_empty_folder_is_filled_and_an_old_one_replaced_on_request(stage, tmp_path):
    (tmp_path / "out").mkdir()
    merge_checkpoint(stage, tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("of an older run")
    merge_checkpoint(stage, tmp_path / "out", replace=True)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(stage, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("dali_llava.processing.LlavaAudioProcessor.save_pretrained", fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("of an older run")
    for out in (tmp_path / "new", tmp_path / "out"):
        with pytest.raises(OSError, match="No space left"):
            merge_checkpoint(stage, out, replace=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept.txt"]


def test_a_stage_without_its_base_is_an_error(stage, tmp_path, capsys):
    shutil.copytree(stage, tmp_path / "alone")
    assert main(["merge", str(tmp_path / "alone"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "base model '../base'" in error and "dali-llava merge STAGE OUT" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
