"""The checkpoint of a stage: its trained weights on top of the base model, for any number of stages."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dali_llava.modeling import LlavaAudioForConditionalGeneration, LlavaAudioModel
from dali_llava.modeling.stage_checkpoint import read_stage, stage_names, write_stage


def change(model, part, seed: int) -> None:
    """Freeze the model except for `part`, and change the weights of `part`, as a stage does."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    part.requires_grad_(True)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(generator=generator)


def assert_equal_weights(model, expected: dict[str, torch.Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    different = [name for name, tensor in weights.items() if not torch.equal(tensor, expected[name])]
    assert not different


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    """The folder of a run (base, `prefix` on it, `aligned` on `prefix`), and the expected merged weights."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_model_dir, folder / "base")
    model = LlavaAudioForConditionalGeneration.from_pretrained(folder / "base")
    change(model, model.model.prefix, seed=1)
    model.save_stage(folder / "prefix", base=str(folder / "base"), stage="prefix")
    change(model, model.model.audio_tower, seed=2)
    model.save_stage(folder / "aligned", base=str(folder / "prefix"), stage="align:mmd")
    return folder, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_stage_holds_only_what_it_trained(run):
    folder, expected = run
    for stage, part in (("prefix", "model.prefix."), ("aligned", "model.audio_tower.")):
        trained = sorted(name for name in expected if name.startswith(part))
        assert sorted(load_file(folder / stage / "stage.safetensors")) == trained
        assert json.loads((folder / stage / "stage.json").read_text())["trained"] == trained
        assert not (folder / stage / "model.safetensors").exists()
    assert json.loads((folder / "aligned" / "stage.json").read_text())["stage"] == "align:mmd"


def test_stages_are_named_from_the_last_back_to_the_whole_checkpoint(run):
    folder, _ = run
    assert stage_names(folder / "aligned") == ["align:mmd", "prefix"]
    assert stage_names(folder / "prefix") == ["prefix"] and stage_names(folder / "base") == []


def test_two_stages_assemble_exactly(run):
    folder, expected = run
    assert_equal_weights(LlavaAudioForConditionalGeneration.from_pretrained(folder / "aligned"), expected)
    one = LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix").state_dict()
    assert torch.equal(one["model.prefix.weight"], expected["model.prefix.weight"])
    assert not torch.equal(one["model.audio_tower.proj.weight"], expected["model.audio_tower.proj.weight"])


def test_backbone_assembles_too(run):
    folder, expected = run
    backbone = {name.removeprefix("model."): tensor for name, tensor in expected.items() if name.startswith("model.")}
    assert_equal_weights(LlavaAudioModel.from_pretrained(folder / "aligned"), backbone)


def test_loading_options_reach_the_base(run):
    folder, expected = run
    model, report = LlavaAudioForConditionalGeneration.from_pretrained(
        str(folder / "aligned"), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert_equal_weights(model, {name: tensor.bfloat16() for name, tensor in expected.items()})


def test_moved_run_still_assembles(run, tmp_path):
    folder, expected = run
    shutil.move(folder, tmp_path / "elsewhere" / "deeper")
    moved = tmp_path / "elsewhere" / "deeper"
    assert_equal_weights(LlavaAudioForConditionalGeneration.from_pretrained(moved / "aligned"), expected)


def test_base_is_found_from_any_working_directory(run, tmp_path, monkeypatch):
    folder, expected = run
    monkeypatch.chdir(folder)
    assert_equal_weights(LlavaAudioForConditionalGeneration.from_pretrained("aligned"), expected)
    monkeypatch.chdir(tmp_path)
    assert_equal_weights(LlavaAudioForConditionalGeneration.from_pretrained("run/aligned"), expected)


def test_assembled_model_saves_as_a_whole_checkpoint(run, tmp_path):
    folder, expected = run
    LlavaAudioForConditionalGeneration.from_pretrained(folder / "aligned").save_pretrained(tmp_path / "whole")
    shutil.rmtree(folder)
    assert_equal_weights(LlavaAudioForConditionalGeneration.from_pretrained(tmp_path / "whole"), expected)


def test_stage_keeps_its_own_configuration(run, tmp_path):
    folder, _ = run
    model = LlavaAudioForConditionalGeneration.from_pretrained(folder / "aligned")
    model.config.prefix_modalities = ["audiovisual"]
    change(model, model.model.audio_projector, seed=3)
    model.save_stage(folder / "distilled", base=str(folder / "aligned"), stage="distill")
    loaded = LlavaAudioForConditionalGeneration.from_pretrained(folder / "distilled")
    assert loaded.config.prefix_modalities == ["audiovisual"]
    assert_equal_weights(loaded, model.state_dict())


def test_whole_checkpoint_is_no_stage(tiny_model_dir):
    assert read_stage(tiny_model_dir) is None


def test_hub_base_is_kept_by_name(tmp_path):
    write_stage(tmp_path, {"w": torch.ones(2)}, base="org/captioner", stage="prefix")
    base, tensors = read_stage(tmp_path)
    assert base == "org/captioner" and torch.equal(tensors["w"], torch.ones(2))


def test_tied_and_strided_weights_are_written(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3).T
    write_stage(tmp_path, {"w": weight}, base="org/captioner", stage="prefix")
    assert torch.equal(read_stage(tmp_path)[1]["w"], weight)


def test_nothing_trained_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ".*stage 'prefix' trained no weight"):
        write_stage(tmp_path, {}, base="org/captioner", stage="prefix")


@pytest.mark.parametrize("shape", [(16, 24), (8, 32)])
def test_weight_of_another_shape_names_weight_shapes_and_base(run, shape):
    folder, _ = run
    save_file({"model.prefix.weight": torch.zeros(shape)}, folder / "prefix" / "stage.safetensors")
    with pytest.raises(ValueError) as error:
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix")
    message = str(error.value)
    for part in (folder / "prefix", "model.prefix.weight", shape, folder / "base", (16, 32)):
        assert str(part) in message


def test_weight_that_the_base_lacks_is_named(run):
    folder, _ = run
    write_stage(folder / "prefix", {"model.ear.weight": torch.zeros(2)}, base=str(folder / "base"), stage="prefix")
    with pytest.raises(ValueError, match=r"model\.ear\.weight has shape \(2,\).*no such weight"):
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix")


def test_weights_that_differ_from_the_list_are_refused(run):
    folder, _ = run
    save_file({"model.suffix.weight": torch.zeros(16, 32)}, folder / "prefix" / "stage.safetensors")
    with pytest.raises(ValueError, match="stage.safetensors does not contain the weights that stage.json lists"):
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix")


def test_description_without_base_names_file_and_field(run):
    folder, _ = run
    path = folder / "prefix" / "stage.json"
    description = json.loads(path.read_text())
    del description["base_model_name_or_path"]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=re.escape(str(path)) + " has no base_model_name_or_path"):
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix")


def test_missing_base_is_named_with_the_stage(run):
    folder, _ = run
    shutil.rmtree(folder / "base")
    with pytest.raises(OSError) as error:
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix")
    assert str(folder / "prefix") in str(error.value) and str(folder / "base") in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 1000])
def test_truncated_weights_are_named(run, kept):
    folder, _ = run
    path = folder / "prefix" / "stage.safetensors"
    os.truncate(path, kept)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix")


def test_missing_weights_are_named(run):
    folder, _ = run
    (folder / "prefix" / "stage.safetensors").unlink()
    with pytest.raises(OSError, match="stage.safetensors"):
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix")


def test_broken_description_is_named(run):
    folder, _ = run
    path = folder / "prefix" / "stage.json"
    path.write_text('{"stage": "pre')
    with pytest.raises(ValueError, match=re.escape(str(path))):
        LlavaAudioForConditionalGeneration.from_pretrained(folder / "prefix")


def test_rewriting_leaves_no_temporary_files(run):
    folder, _ = run
    write_stage(folder / "prefix", {"w": torch.zeros(2)}, base=str(folder / "base"), stage="prefix")
    assert not [path for path in (folder / "prefix").iterdir() if path.name.startswith(".")]
    assert list(read_stage(folder / "prefix")[1]) == ["w"]
