"""The configuration: defaults of the paper, saving and loading, and errors for sizes that do not match."""

import json

import pytest
from transformers import AutoConfig

from dali_llava.modeling import CavMaeAudioConfig, LlavaAudioConfig


def test_defaults_are_the_papers_sizes():
    config = LlavaAudioConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("clip_vision_model", "llama")
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (336, 14)
    assert (config.vision_config.hidden_size, config.text_config.hidden_size) == (1024, 4096)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    audio = config.audio_config
    assert (audio.hidden_size, audio.num_hidden_layers, audio.num_joint_layers) == (768, 11, 1)
    assert (audio.num_attention_heads, audio.output_size, audio.layer_norm_eps) == (12, 1024, 1e-5)
    assert audio.grid_size == (8, 64)
    # N(0, 1e-4) is a variance
    assert config.prefix_length == 16 and config.prefix_initializer_range**2 == pytest.approx(1e-4)


def test_model_type_is_not_llavas():
    """Without trust, a native model_type would load the native class and silently ignore the audio."""
    assert LlavaAudioConfig.model_type == "llava_audio"
    assert CavMaeAudioConfig.model_type == "cav_mae_audio"


def test_saved_configuration_comes_back_whole(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    loaded = LlavaAudioConfig.from_pretrained(tmp_path)
    expected = tiny_config.to_dict()
    assert loaded.to_dict() == expected
    assert isinstance(loaded.audio_config, CavMaeAudioConfig)
    assert type(loaded.vision_config) is type(tiny_config.vision_config)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlavaAudioConfig


def test_auto_map_names_every_auto_class(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_llava_audio.LlavaAudioConfig",
        "AutoModel": "modeling_llava_audio.LlavaAudioModel",
        "AutoModelForImageTextToText": "modeling_llava_audio.LlavaAudioForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_llava_audio.LlavaAudioForConditionalGeneration",
        "AutoProcessor": "processing_llava_audio.LlavaAudioProcessor",
    }


def test_audio_tokens_must_be_as_wide_as_image_tokens():
    with pytest.raises(ValueError, match=r"audio_config\.output_size \(512\).*width \(1024\)"):
        LlavaAudioConfig(audio_config={"output_size": 512})


def test_image_width_counts_every_feature_layer():
    config = LlavaAudioConfig(vision_feature_layer=[-2, -5], audio_config={"output_size": 2048})
    assert config.audio_config.output_size == 2048
    with pytest.raises(ValueError, match=r"output_size \(1024\).*width \(2048\)"):
        LlavaAudioConfig(vision_feature_layer=[-2, -5])


@pytest.mark.parametrize(("field", "value"), [("num_mel_bins", 120), ("max_length", 1000)])
def test_spectrogram_must_fill_patches(field, value):
    with pytest.raises(ValueError, match=rf"audio_config\.{field} \({value}\) must be .*patch_size \(16\)"):
        CavMaeAudioConfig(**{field: value})


@pytest.mark.parametrize("sizes", [{"hidden_size": 760}, {"hidden_size": 60, "num_attention_heads": 4}])
def test_width_must_divide_into_heads_and_positions(sizes):
    message = rf"audio_config\.hidden_size \({sizes['hidden_size']}\).*num_attention_heads"
    with pytest.raises(ValueError, match=message):
        CavMaeAudioConfig(**sizes)


@pytest.mark.parametrize("field", ["audio_token_index", "prefix_token_index"])
def test_placeholders_need_ids_of_their_own(field):
    with pytest.raises(ValueError, match="image/audio/prefix_token_index are .*32000"):
        LlavaAudioConfig(**{field: 32000, "image_token_index": 32000})


def test_fusion_mode_of_the_last_version_is_read_and_dropped(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "fusion_mode" not in saved
    (tmp_path / "config.json").write_text(json.dumps(saved | {"fusion_mode": "concatenate"}))
    loaded = LlavaAudioConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == tiny_config.to_dict() and not hasattr(loaded, "fusion_mode")


def test_unknown_fusion_mode_is_refused():
    with pytest.raises(Exception, match="fusion_mode"):
        LlavaAudioConfig(fusion_mode="telepathy")
