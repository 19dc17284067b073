"""`from_pretrained` never leaves weights of the image captioner at random values."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from dali_llava.modeling import (
    LlavaAudioConfig,
    LlavaAudioForConditionalGeneration,
    LlavaAudioModel,
    LlavaAudioOnlyForConditionalGeneration,
    LlavaAudioTowers,
)


OWN = [
    LlavaAudioForConditionalGeneration,
    LlavaAudioModel,
    LlavaAudioTowers,
    LlavaAudioOnlyForConditionalGeneration,
]


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("model_class", OWN)
def test_a_llava_folder_is_an_error_that_names_convert(model_class, with_config, write_llava, tiny_config):
    folder = write_llava()
    options = {"config": tiny_config} if with_config else {}
    with pytest.raises(ValueError, match=rf"run `dali-llava convert llava {folder} OUT`"):
        model_class.from_pretrained(folder, **options)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_the_auto_classes_give_our_class_only_with_our_config(auto_class, write_llava, tiny_config):
    folder = write_llava()
    with pytest.raises(ValueError, match="run `dali-llava convert llava"):
        auto_class.from_pretrained(folder, config=tiny_config)
    assert not isinstance(auto_class.from_pretrained(folder).config, LlavaAudioConfig)


@pytest.mark.parametrize("part", ["language_model", "vision_tower", "multi_modal_projector", "lm_head"])
def test_a_checkpoint_without_a_part_of_the_image_captioner_is_an_error(part, write_llava, convert):
    out = convert("llava", write_llava())
    weights = load_file(out / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{len(weights) - len(kept)} weights of the image captioner are missing"):
        LlavaAudioForConditionalGeneration.from_pretrained(out)


def test_a_checkpoint_with_the_names_of_llava_is_an_error(write_llava, convert):
    """The weights of LLaVA in a folder with our configuration."""
    source = write_llava()
    out = convert("llava", source)
    (out / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="weights of the image captioner are missing, the first is lm_head.weight"):
        LlavaAudioForConditionalGeneration.from_pretrained(out)


def test_audio_weights_may_be_missing(write_llava, convert):
    out = convert("llava", write_llava())
    weights = load_file(out / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "audio_tower" not in name}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    model, report = LlavaAudioForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert set(report["missing_keys"]) == weights.keys() - kept.keys()
    assert isinstance(model, LlavaAudioForConditionalGeneration)


def test_a_model_of_another_kind_is_an_error(tiny_model_dir, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type is 'bert', not 'llava_audio'"):
        LlavaAudioForConditionalGeneration.from_pretrained(tmp_path)
