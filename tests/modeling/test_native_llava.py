"""Without audio and prefix, the captioner equals LLaVA in transformers bit for bit."""

import copy

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration


WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE, AUDIO, PREFIX, PAD, VOCABULARY = 60, 61, 62, 0, 64
CLIP = {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 8, **WIDTH}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 24, "patch_size": 8, "vision_use_head": False, **WIDTH}
LLAMA = {"model_type": "llama", "vocab_size": VOCABULARY, "initializer_range": 0.2, **WIDTH}
QWEN2 = {"model_type": "qwen2", "vocab_size": VOCABULARY, "initializer_range": 0.2, "num_key_value_heads": 2, **WIDTH}
# (vision tower, decoder, other fields of the configuration)
BACKBONES = {
    "clip-llama": (CLIP, LLAMA, {}),
    "siglip-qwen2": (SIGLIP, QWEN2, {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}),
    "clip-llama-two-layers": (CLIP, LLAMA, {"vision_feature_layer": [-1, -2]}),
}


@pytest.fixture(scope="module", params=BACKBONES)
def pair(request) -> tuple[LlavaForConditionalGeneration, LlavaAudioForConditionalGeneration]:
    vision, text, options = BACKBONES[request.param]
    shared = {"image_token_index": IMAGE, **options}
    torch.manual_seed(0)
    native = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=dict(vision), text_config=dict(text), **shared)
    ).eval()
    layers = options.get("vision_feature_layer", -2)
    audio = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "output_size": 32 * (len(layers) if isinstance(layers, list) else 1),
        "num_mel_bins": 16,
        "max_length": 64,
    }
    config = LlavaAudioConfig(
        vision_config=dict(vision),
        text_config=dict(text),
        audio_config=audio,
        audio_token_index=AUDIO,
        prefix_token_index=PREFIX,
        prefix_length=4,
        **shared,
    )
    ours = LlavaAudioForConditionalGeneration(config).eval()
    missing, unexpected = ours.load_state_dict(native.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[1] for name in missing} == {"audio_tower", "audio_projector", "prefix"}
    return native, ours


def inputs(native, images: int, padded: bool) -> dict[str, torch.Tensor]:
    """Two samples of random text. The first `images` samples have a picture. `padded` left-pads the second by five."""
    generator = torch.Generator().manual_seed(1)
    tokens = 9  # 24 px in patches of 8; CLIP's CLS is dropped, SigLIP has none
    input_ids = torch.randint(3, 50, (2, 20), generator=generator)
    for row in range(images):
        input_ids[row, 7 : 7 + tokens] = IMAGE
    attention_mask = torch.ones_like(input_ids)
    if padded:
        input_ids[1, :5], attention_mask[1, :5] = PAD, 0
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 24, 24, generator=generator)
    return batch


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_logits_equal_native_llavas(pair, images, padded):
    native, ours = pair
    batch = inputs(native, images, padded)
    with torch.no_grad():
        expected, logits = native(**batch).logits, ours(**batch).logits
    assert expected.dtype == torch.float32 and expected.std() > 0.01
    assert torch.equal(logits, expected)


def test_loss_and_generated_tokens_equal_native_llavas(pair):
    native, ours = pair
    batch = inputs(native, images=2, padded=True)
    with torch.no_grad():
        losses = [model(**batch, labels=batch["input_ids"]).loss for model in pair]
    assert torch.equal(*losses)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    assert torch.equal(native.generate(**batch, **options), ours.generate(**batch, **options))


def test_encode_image_gives_what_the_projector_is_given(pair):
    """Alignment compares tokens before the projector, which must be the tokens that captions use."""
    native, ours = pair
    pixel_values = inputs(native, images=2, padded=False)["pixel_values"]
    with torch.no_grad():
        projected = native.model.multi_modal_projector(ours.model.encode_image(pixel_values))
        expected = torch.stack(native.get_image_features(pixel_values).pooler_output)
    assert torch.equal(projected, expected)


def test_audio_weights_cannot_reach_a_picture_without_prefix(pair):
    native, ours = pair
    batch = inputs(native, images=2, padded=True)
    changed = copy.deepcopy(ours)
    with torch.no_grad():
        for part in (changed.model.audio_tower, changed.model.audio_projector, changed.model.prefix):
            for parameter in part.parameters():
                parameter.fill_(float("nan"))
        assert torch.equal(changed(**batch).logits, native(**batch).logits)


def test_logits_to_keep_keeps_the_last(pair):
    native, ours = pair
    batch = inputs(native, images=1, padded=False)
    with torch.no_grad():
        whole, kept = ours(**batch).logits, ours(**batch, logits_to_keep=3).logits
    torch.testing.assert_close(kept, whole[:, -3:])
