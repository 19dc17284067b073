"""`dali-llava convert` with bad sources: one line that names the file or field, and nothing is written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig

from dali_llava.cli import main


MODEL = "model.safetensors"


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(*words)`: the message of `dali-llava convert` for a bad source. Asserts that nothing is written."""

    def refused(*words) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.iterdir())
        assert main(["convert", *map(str, words)]) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("dali-llava: error: ") and shown.err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
        return shown.err

    return refused


def change(folder, **changes) -> None:
    """Replace weights in a folder of LLaVA; None removes one."""
    weights = load_file(folder / MODEL) | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / MODEL)


def test_an_unknown_tensor(write_llava, refused, tmp_path):
    change(folder := write_llava(), image_newline=torch.zeros(3))
    assert f"{folder}: image_newline is unknown; give" in refused("llava", folder, tmp_path / "out")


def test_a_tensor_in_the_names_of_two_versions(write_llava, refused, tmp_path):
    change(folder := write_llava(), **{"lm_head.weight": torch.zeros(64, 32)})
    message = refused("llava", folder, tmp_path / "out")
    assert "language_model.lm_head.weight and lm_head.weight both become lm_head.weight" in message or (
        "lm_head.weight and language_model.lm_head.weight both become lm_head.weight" in message
    )


def test_a_missing_tensor(write_llava, refused, tmp_path):
    change(folder := write_llava(), **{"multi_modal_projector.linear_2.bias": None})
    message = refused("llava", folder, tmp_path / "out")
    assert f"{folder}: no tensor becomes model.multi_modal_projector.linear_2.bias; copy or download" in message


def test_a_wrong_shape(write_llava, refused, tmp_path):
    change(folder := write_llava(), **{"language_model.model.norm.weight": torch.zeros(31)})
    message = refused("llava", folder, tmp_path / "out")
    assert "language_model.model.norm.weight gives shape (31,), but" in message and "has shape (32,)" in message


def test_a_vision_tower_whose_width_does_not_fit(write_llava, refused, tmp_path):
    folder = write_llava()
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {"hidden_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused("llava", folder, tmp_path / "out")
    assert "(32, 48); check the widths in the configuration" in message or "(48,); check the widths" in message


def test_a_truncated_file(write_llava, refused, tmp_path):
    folder = write_llava()
    content = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(content[:-100])
    assert f"{folder / MODEL}: damaged (" in refused("llava", folder, tmp_path / "out")


def test_a_missing_shard(write_original, refused, tmp_path):
    llava, clip = write_original(2)
    shard = llava / "pytorch_model-00002-of-00002.bin"
    shard.unlink()
    message = refused("llava", llava, tmp_path / "out", "--vision", clip)
    assert f"{shard}: the shard is missing; copy or download the whole folder again" in message


def test_a_tensor_in_two_shards(write_original, refused, tmp_path):
    llava, clip = write_original(2)
    first, second = (llava / f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
    torch.save(torch.load(first) | torch.load(second), second)
    message = refused("llava", llava, tmp_path / "out", "--vision", clip)
    assert f"{second}: " in message and f"is also in {first.name}; copy the weights again" in message


def test_a_hostile_pickle_is_not_run(write_original, refused, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    llava, clip = write_original(1)
    shard = llava / "pytorch_model-00001-of-00001.bin"
    torch.save(torch.load(shard) | {"model.norm.weight": Hostile()}, shard)
    assert f"{shard}: contains " in refused("llava", llava, tmp_path / "out", "--vision", clip)


def test_an_original_llava_needs_the_vision_tower_that_it_names(write_llava, write_original, refused, tmp_path):
    llava, clip = write_original(1)
    out = tmp_path / "out"
    assert "add --vision with the folder of openai/clip-vit-large-patch14-336" in refused("llava", llava, out)
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"] |= {"hidden_size": 48}
    (clip / "config.json").write_text(json.dumps(config))
    message = refused("llava", llava, out, "--vision", clip)
    assert f"{clip}: the vision tower has width 48, but the projector of {llava} takes 32; give the folder" in message
    CLIPVisionConfig().save_pretrained(tmp_path / "siglip")
    config = json.loads((tmp_path / "siglip" / "config.json").read_text()) | {"model_type": "siglip_vision_model"}
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(config))
    shutil.copy(clip / "preprocessor_config.json", tmp_path / "siglip")
    message = refused("llava", llava, out, "--vision", tmp_path / "siglip")
    assert "model_type is 'siglip_vision_model', not CLIP" in message
    assert "contains a vision tower; leave out --vision" in refused("llava", write_llava(), out, "--vision", clip)


def test_an_original_llava_with_another_projector(write_original, refused, tmp_path):
    llava, clip = write_original(1)
    config = json.loads((llava / "config.json").read_text()) | {"mm_projector_type": "linear"}
    (llava / "config.json").write_text(json.dumps(config))
    assert "mm_projector_type 'linear' is not supported" in refused("llava", llava, tmp_path / "out", "--vision", clip)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json in it; give the folder of a LLaVA"),
        ("{", "not a JSON configuration"),
        ("[]", "not a JSON configuration"),
        ('{"model_type": "bert"}', "model_type is 'bert'; give a LLaVA-1.5 or a model of this package"),
    ],
)
def test_a_folder_of_something_else(content, message, write_llava, refused, tmp_path):
    folder = write_llava()
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert message in refused("llava", folder, tmp_path / "out")


def test_a_stage(write_llava, refused, tmp_path):
    folder = write_llava()
    (folder / "stage.json").write_text("{}")
    assert f"run `dali-llava merge {folder} MERGED` and give MERGED" in refused("llava", folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tokenizer.json", "no tokenizer.json and no"),
        ("processor_config.json", "the image processor cannot be loaded"),
    ],
)
def test_a_missing_tokenizer_or_image_processor(file, message, write_llava, refused, tmp_path):
    folder = write_llava()
    (folder / file).unlink()
    assert f"{folder}: {message}" in refused("llava", folder, tmp_path / "out")


def test_a_disk_that_is_too_small(write_llava, refused, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("dali_llava.modeling.convert.writer.shutil.disk_usage", lambda path: usage)
    message = refused("llava", write_llava(), tmp_path / "out")
    assert "but the disk has 0.0 GB free; free some space, or choose another disk" in message


def test_an_output_folder_that_exists(write_llava, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert f"{tmp_path / 'out'}: already exists; choose" in refused("llava", write_llava(), tmp_path / "out")


def test_the_export_of_what_is_no_captioner(write_llava, tmp_path, capsys):
    folder = write_llava()
    assert main(["export-llava", str(folder), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"dali-llava: error: {folder}: is a LLaVA already; give a captioner of this package\n"
    )
    assert not (tmp_path / "out").exists()
