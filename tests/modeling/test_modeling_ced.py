"""The CED tower compared with an independent CED in float64, its options, LoRA, and the captioner with it."""

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from dali_llava.modeling import CedAudioConfig, CedAudioModel, LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.processing import PLAIN_CHAT_TEMPLATE, SOUND_PROMPT, LlavaAudioFeatureExtractor, LlavaAudioProcessor


HEADS = 4
WIDTH = 48


def tiny_config(**changes) -> CedAudioConfig:
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 96,
        "num_mel_bins": 32,
        "max_length": 96,
        "initializer_range": 0.2,
    }
    return CedAudioConfig(**{**sizes, **changes})


def load_ced(tower: CedAudioModel, weights: dict[str, torch.Tensor]) -> CedAudioModel:
    """Copy weights with the names of CED to the tower, each tensor exactly once."""
    names = {"init_bn.1": "embeddings.init_bn", "patch_embed.proj": "embeddings.patch_embeddings", "blocks": "layers"}
    names |= {"time_pos": "embeddings.time_pos", "freq_pos": "embeddings.freq_pos", "attn.proj": "attention.o_proj"}
    state = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "attn.qkv" in name:
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.{part}_proj")] = chunk
        else:
            state[name] = tensor
    tower.load_state_dict(state, strict=True)
    return tower


@pytest.fixture
def ced(reference_towers):
    """`ced(seed, **changes)`: a tower in eval mode with random weights, and these weights by the names of CED."""

    def ced(seed: int = 0, **changes) -> tuple[CedAudioModel, dict[str, torch.Tensor]]:
        weights = reference_towers.ced_weights(tiny_config(**changes), seed)
        return load_ced(CedAudioModel(tiny_config(**changes)).eval(), weights), weights

    return ced


@pytest.fixture
def ced_encoder(reference_towers):
    return reference_towers.ced_encoder


def decibels(batch: int, frames: int, seed: int = 0) -> torch.Tensor:
    return -21 + 32 * torch.randn(batch, frames, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [96, 32, 80, 112, 208])  # as long as the positions, shorter, longer
@pytest.mark.parametrize("seed", [0, 1])
def test_tower_equals_ced_in_float64(seed, frames, ced, ced_encoder):
    tower, weights = ced(seed)
    spectrograms = decibels(2, frames, seed)
    with torch.no_grad():
        tokens = tower(spectrograms).last_hidden_state
    expected = ced_encoder(weights, spectrograms, HEADS).flatten(1, 2)
    assert tokens.shape == (2, 2 * frames // 16, WIDTH) and expected.std() > 0.3
    assert (tokens.double() - expected).abs().max() < 1e-5


def test_mel_pooling_averages_the_tokens_of_a_column(ced, ced_encoder):
    tower, weights = ced(mel_pooling=True)
    with torch.no_grad():
        tokens = tower(decibels(2, 96)).last_hidden_state
    expected = ced_encoder(weights, decibels(2, 96), HEADS).mean(1)
    assert tokens.shape == (2, 6, WIDTH)
    assert (tokens.double() - expected).abs().max() < 1e-5


def test_another_output_size_adds_a_linear_layer():
    torch.manual_seed(0)
    tower = CedAudioModel(tiny_config(output_size=20)).eval()
    plain = CedAudioModel(tiny_config()).eval()
    plain.load_state_dict(
        {name: weight for name, weight in tower.state_dict().items() if not name.startswith("proj.")}
    )
    with torch.no_grad():
        tokens, hidden = (each(decibels(1, 96)).last_hidden_state for each in (tower, plain))
    assert torch.equal(tokens, hidden @ tower.proj.weight.T + tower.proj.bias)


def test_batch_norm_is_frozen_in_training_by_default(ced):
    tower, weights = ced()
    spectrograms = decibels(2, 96)
    evaluated = tower(spectrograms).last_hidden_state
    before = {name: tensor.clone() for name, tensor in tower.named_buffers()}
    tower.train()
    assert tower.training and tower.layers.training and not tower.embeddings.init_bn.training
    assert torch.equal(tower(spectrograms).last_hidden_state, evaluated)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.named_buffers())


@pytest.mark.parametrize("padded", [False, True])
def test_batch_norm_of_the_reference_uses_and_stores_the_statistics_of_the_batch(padded, ced, ced_encoder):
    """Padding does not count: it leaves the tokens and the stored statistics as they are without it."""
    tower, weights = ced(freeze_batch_norm=False)
    spectrograms, frames = decibels(3, 96), None
    expected = ced_encoder(weights, spectrograms, HEADS, batch_norm=True).flatten(1, 2)
    inputs = spectrograms
    if padded:
        inputs = torch.nn.functional.pad(spectrograms, (0, 0, 0, 32), value=77.0)
        frames = (torch.arange(128) < 96).expand(3, -1)
    with torch.no_grad():
        tokens = tower.train()(inputs, frames).last_hidden_state
    if padded:
        tokens = tokens[tower.token_mask(frames)].view(3, 12, WIDTH)
    assert (tokens.double() - expected).abs().max() < 1e-5
    flat = spectrograms.flatten(0, 1).double()
    bn = tower.embeddings.init_bn
    mean = 0.99 * weights["init_bn.1.running_mean"] + 0.01 * flat.mean(0)
    variance = 0.99 * weights["init_bn.1.running_var"] + 0.01 * flat.var(0)  # unbiased, as torch stores it
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(bn.running_var.double(), variance, rtol=1e-5, atol=0)
    assert bn.num_batches_tracked == 8


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mel_pooling", [False, True])
def test_padded_clips_equal_clips_alone(mel_pooling, attention, side, ced):
    tower, _ = ced(mel_pooling=mel_pooling)
    tower.set_attn_implementation(attention)
    lengths = [32, 128, 96, 64]
    features = decibels(4, 128)
    mask = torch.arange(128)[None] < torch.tensor(lengths)[:, None]
    if side == "left":  # as `pipeline` pads
        features, mask = features.flip(1), mask.flip(1)
    with torch.no_grad():
        together = tower(features, mask).last_hidden_state
        keep = tower.token_mask(mask)
        assert keep.shape == together.shape[:2]
        assert keep.sum(-1).tolist() == [tower.config.num_audio_tokens(length) for length in lengths]
        for clip, tokens, kept, length in zip(features, together, keep, lengths, strict=True):
            counted = clip[:length] if side == "right" else clip[-length:]
            alone = tower(counted[None]).last_hidden_state[0]
            assert (tokens[kept] - alone).abs().max() < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(ced):
    gradients, runs = [], []
    for checkpointing in (False, True):
        tower, _ = ced()
        tower.train()
        if checkpointing:
            tower.gradient_checkpointing_enable()
        calls = []
        for layer in tower.layers:
            layer.attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tower(decibels(2, 64)).last_hidden_state[..., :7].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
        runs.append(len(calls))
    assert runs == [2, 4]  # recomputed in the backward pass
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_full_size_tower_has_85_million_parameters_and_lora_the_number_of_lavcap():
    with torch.device("meta"):
        tower = CedAudioModel(CedAudioConfig())
        assert tower.num_parameters() == 85_305_728
        adapted = get_peft_model(tower, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert trainable == 12 * 2 * 8 * (768 + 768) == 294_912


def test_new_tower_starts_with_an_identity_batch_norm_and_random_positions():
    torch.manual_seed(0)
    embeddings = CedAudioModel(tiny_config()).embeddings
    assert embeddings.init_bn.running_mean.eq(0).all() and embeddings.init_bn.running_var.eq(1).all()
    for positions in (embeddings.time_pos_embed, embeddings.freq_pos_embed):
        assert positions.detach().std() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("shape", [(96, 32), (1, 96, 64), (1, 90, 32)])
def test_wrong_spectrogram_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"a multiple of 16 frames, 32 mel bins), got {shape}")):
        CedAudioModel(tiny_config())(torch.zeros(shape))


def test_wrong_configuration_is_refused():
    with pytest.raises(ValueError, match=r"audio_config.front_end 'mfcc' is unknown; choose one of decibel, kaldi"):
        CedAudioConfig(front_end="mfcc")
    with pytest.raises(ValueError, match=r"audio_config.num_joint_layers \(1\) must be 0 for CED"):
        CedAudioConfig(num_joint_layers=1)
    with pytest.raises(ValueError, match=r"audio_config.max_length \(1012\) must be a multiple of patch_size"):
        CedAudioConfig(max_length=1012)


def test_saved_tower_is_loaded_by_the_auto_class(tmp_path, ced):
    tower, _ = ced(mel_pooling=True, freeze_batch_norm=False, front_end="kaldi", output_size=WIDTH)
    tower.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is CedAudioModel and loaded.config.to_diff_dict() == tower.config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(loaded(decibels(1, 96)).last_hidden_state, tower(decibels(1, 96)).last_hidden_state)


def test_half_precision_tower_takes_float32_spectrograms(ced):
    tower = ced()[0].to(torch.bfloat16)
    with torch.no_grad():
        assert tower(decibels(1, 96)).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("mel_pooling", [False, True])
@pytest.mark.parametrize("front_end", ["decibel", "kaldi"])
def test_feature_extractor_of_the_configuration_counts_as_the_tower(front_end, mel_pooling):
    config = CedAudioConfig(mel_pooling=mel_pooling, front_end=front_end)
    extractor = LlavaAudioFeatureExtractor(**config.feature_extractor_kwargs)
    for frames in (1, 31, 32, 33, 256, 1024):
        assert extractor.num_audio_tokens(frames) == config.num_audio_tokens(frames)
    assert config.num_audio_tokens(1024) == (64 if mel_pooling else 256)
    statistics = {"decibel": (0.0, 1.0), "kaldi": (-4.346, 4.332)}[front_end]
    assert (extractor.front_end, extractor.mean, extractor.std) == (front_end, *statistics)


@pytest.fixture
def ced_captioner(tiny_config, tiny_processor) -> tuple[LlavaAudioForConditionalGeneration, LlavaAudioProcessor]:
    """A captioner with a CED tower whose tokens are averaged over mel, and its processor."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower = {"model_type": "ced_audio", "max_length": 256, "mel_pooling": True, "initializer_range": 0.3, **sizes}
    config = LlavaAudioConfig(**{**tiny_config.to_dict(), "audio_config": tower})
    torch.manual_seed(0)
    model = LlavaAudioForConditionalGeneration(config).eval()
    model.model.audio_tower.embeddings.init_bn.running_mean.fill_(-20.0)
    model.model.audio_tower.embeddings.init_bn.running_var.fill_(1000.0)
    processor = LlavaAudioProcessor(
        image_processor=tiny_processor.image_processor,
        tokenizer=tiny_processor.tokenizer,
        feature_extractor=LlavaAudioFeatureExtractor(**config.audio_config.feature_extractor_kwargs),
        patch_size=8,
        chat_template=PLAIN_CHAT_TEMPLATE,
    )
    return model, processor


def test_captioner_with_ced_is_saved_and_loaded(ced_captioner, tmp_path):
    model, processor = ced_captioner
    model.config.check_processor(processor)
    for part in ced_captioner:
        part.save_pretrained(tmp_path / "model")
    loaded = LlavaAudioForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    text = processor.format_prompt(SOUND_PROMPT, audio=True, prefix=True)
    sound = 0.1 * np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    inputs = processor(text=text, audio=sound, return_tensors="pt")
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 16
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
        assert torch.equal(loaded(**inputs).logits[0, -1], expected)


def test_feature_extractor_of_another_front_end_is_refused(ced_captioner):
    model, processor = ced_captioner
    processor.feature_extractor = LlavaAudioFeatureExtractor(num_mel_bins=64, max_length=256, tokens_per_column=1)
    with pytest.raises(ValueError, match="has the front end 'kaldi', the audio tower 'ced_audio' takes 'decibel'"):
        model.config.check_processor(processor)
