"""Parts of the captioner: their parameters, the tensors that are read, and the stages that they write."""

import copy

import pytest
import safetensors
import torch
from safetensors import safe_open

from dali_llava.modeling import (
    LlavaAudioConfig,
    LlavaAudioForConditionalGeneration,
    LlavaAudioModel,
    LlavaAudioOnlyForConditionalGeneration,
    LlavaAudioTowers,
)
from dali_llava.modeling import loading as model_loading


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_full_size_towers_hold_no_language_model():
    """CLIP ViT-L/14@336 and CAV-MAE; the language model, projectors and prefix of the captioner are 6.8e9 more."""
    with torch.device("meta"):
        towers = LlavaAudioTowers(LlavaAudioConfig())
        captioner = LlavaAudioForConditionalGeneration(LlavaAudioConfig())
    parts = {name: count(module) for name, module in towers.named_children()}
    assert parts == {"vision_tower": 303_507_456, "audio_tower": 86_434_816}
    assert count(towers) == sum(parts.values())
    rest = {name: count(module) for name, module in captioner.model.named_children() if name not in parts}
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    language_model = 2 * 32_064 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096) + 4096
    assert rest["multi_modal_projector"] == rest["audio_projector"] == projector
    assert rest["prefix"] == 16 * 4096
    assert rest["language_model"] + count(captioner.lm_head) == language_model
    assert count(captioner) - count(towers) == language_model + 2 * projector + 16 * 4096


@pytest.fixture
def captioner(tiny_config, tmp_path):
    """A captioner, its checkpoint `captioner`, and on it a stage `prefix`."""
    torch.manual_seed(0)
    model = LlavaAudioForConditionalGeneration(tiny_config)
    model.save_pretrained(tmp_path / "captioner")
    model.requires_grad_(False)
    model.model.prefix.requires_grad_(True)
    model.save_stage(tmp_path / "prefix", base=str(tmp_path / "captioner"), stage="prefix")
    return model


@pytest.fixture
def read(monkeypatch) -> set[str]:
    """The names of the tensors that are read from files."""
    names = set()

    class Counted:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            names.add(name)
            return self.file.get_tensor(name)

        def get_slice(self, name):
            outer = self.file.get_slice(name)

            class Slice:
                def __getitem__(self, index):
                    names.add(name)
                    return outer[index]

                def __getattr__(self, attribute):
                    return getattr(outer, attribute)

            return Slice()

    monkeypatch.setattr(safetensors, "safe_open", Counted)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", Counted)
    monkeypatch.setattr(model_loading, "safe_open", Counted)
    return names


@pytest.mark.parametrize("source", ["captioner", "prefix"])
def test_the_vision_tower_of_an_audio_captioner_is_not_read(captioner, tmp_path, read, source):
    model, report = LlavaAudioOnlyForConditionalGeneration.from_pretrained(tmp_path / source, output_loading_info=True)
    expected = {name: tensor for name, tensor in captioner.state_dict().items() if "vision_tower" not in name}
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert read == set(expected)


@pytest.mark.parametrize("source", ["captioner", "prefix"])
def test_only_the_towers_weights_are_read(captioner, tmp_path, read, source):
    towers, report = LlavaAudioTowers.from_pretrained(tmp_path / source, output_loading_info=True)
    expected = captioner.model.state_dict()
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in towers.state_dict().items())
    assert read == {f"model.{name}" for name in towers.state_dict()}
    read.clear()
    LlavaAudioModel.from_pretrained(tmp_path / source)
    assert read > {"model.language_model.embed_tokens.weight"}  # `read` also records other models


def test_tokens_are_the_captioners(captioner, tmp_path, tiny_config):
    towers = LlavaAudioTowers.from_pretrained(tmp_path / "captioner").eval()
    model = captioner.eval().model
    generator = torch.Generator().manual_seed(1)
    side, audio = tiny_config.vision_config.image_size, tiny_config.audio_config
    pixels = torch.rand(2, 3, side, side, generator=generator)
    features = torch.randn(2, audio.max_length, audio.num_mel_bins, generator=generator)
    # Copies have aligned weights. Those in a file may not be, and then other kernels round differently.
    towers, model = copy.deepcopy(towers), copy.deepcopy(model)
    assert torch.equal(towers.encode_image(pixels), model.encode_image(pixels))
    assert torch.equal(towers.encode_audio(features), model.encode_audio(features))


@pytest.mark.parametrize("part", [LlavaAudioTowers, LlavaAudioOnlyForConditionalGeneration])
def test_stage_of_a_part_is_the_captioners(captioner, tmp_path, part):
    """The files are the same after training the audio tower of a part or of the whole captioner."""
    folders = tmp_path / "by_part", tmp_path / "by_captioner"
    for model_class, folder in zip((part, LlavaAudioForConditionalGeneration), folders, strict=True):
        model = model_class.from_pretrained(tmp_path / "prefix")
        tower = model.get_submodule("audio_tower" if model_class is LlavaAudioTowers else "model.audio_tower")
        model.requires_grad_(False)
        tower.requires_grad_(True)
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter += 1
        model.save_stage(folder, base=str(tmp_path / "prefix"), stage="align:mmd")
    for name in sorted(path.name for path in folders[1].iterdir()):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    loaded = LlavaAudioForConditionalGeneration.from_pretrained(folders[0]).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())  # the captioner's
