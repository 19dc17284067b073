"""The audio tower compared with an independent CAV-MAE in float64, and its transformers features."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from dali_llava.modeling import CavMaeAudioConfig, CavMaeAudioModel
from dali_llava.modeling.modeling_cav_mae import CavMaeAttention, CavMaeLayer, sincos_positions


HEADS = 4
WIDTH = 48


def tiny_config(**changes) -> CavMaeAudioConfig:
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_joint_layers": 1,
        "num_attention_heads": HEADS,
        "intermediate_size": 96,
        "output_size": 32,
        "num_mel_bins": 32,
        "max_length": 96,
        "initializer_range": 0.2,
    }
    return CavMaeAudioConfig(**{**sizes, **changes})


def tiny_tower(seed: int = 0, **changes) -> CavMaeAudioModel:
    torch.manual_seed(seed)
    return CavMaeAudioModel(tiny_config(**changes)).eval()


def load_cav_mae(tower: CavMaeAudioModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights in the released layout to the tower, each tensor exactly once."""
    names = {
        "patch_embed_a.proj": "embeddings.patch_embeddings",
        "pos_embed_a": "embeddings.position_embeddings",
        "modality_a": "embeddings.modality_embedding",
        "norm_a": "norm",
        "blocks_a": "layers",
        "blocks_u": "joint_layers",
        "norm1_a": "norm1",
        "norm2_a": "norm2",
        "attn.proj": "attention.o_proj",
    }
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


@pytest.mark.parametrize("seed", [0, 1])
def test_tower_equals_cav_mae_in_float64(seed, reference_towers):
    tower = tiny_tower(num_hidden_layers=3, num_joint_layers=2)
    weights = reference_towers.cav_mae_weights(tower.config, seed)
    load_cav_mae(tower, weights)
    fbank = torch.randn(2, 96, 32, generator=torch.Generator().manual_seed(seed + 10))
    with torch.no_grad():
        tokens = tower(fbank).last_hidden_state
    expected = reference_towers.cav_mae_audio_branch(weights, fbank, HEADS)
    assert tokens.shape == (2, 2 * 6, 32) and expected.std() > 0.3
    assert (tokens.double() - expected).abs().max() < 1e-5


def test_full_size_tower_has_86_million_parameters():
    config = CavMaeAudioConfig()
    with torch.device("meta"):
        tower = CavMaeAudioModel(config)
    width, inner, blocks = 768, 3072, 12
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 2 * 2 * width
    rest = (16 * 16 + 1) * width + 512 * width + width + 2 * width + width * 1024 + 1024
    assert tower.num_parameters() == blocks * block + rest
    assert round(tower.num_parameters() / 1e6, 1) == 86.4
    assert config.grid_size == (8, 64)


@pytest.mark.parametrize(("width", "rows", "columns"), [(768, 8, 64), (48, 2, 6)])
def test_positions_encode_time_then_mel_sine_then_cosine(width, rows, columns):
    """Token r * columns + c has [sin, cos] of the time c in the first half, and of the mel row r in the second."""
    quarter = width // 4
    frequency = 1 / 10000 ** (np.arange(quarter) / quarter)
    expected = np.empty((rows * columns, width))
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        time, mel = column * frequency, row * frequency
        expected[token] = np.concatenate([np.sin(time), np.cos(time), np.sin(mel), np.cos(mel)])
    np.testing.assert_allclose(sincos_positions(width, rows, columns).numpy(), expected, atol=1e-6)


def test_new_tower_starts_from_these_positions():
    tower = tiny_tower()
    assert torch.equal(tower.embeddings.position_embeddings[0], sincos_positions(WIDTH, 2, 6))
    assert tower.embeddings.position_embeddings.requires_grad
    assert tower.embeddings.modality_embedding.detach().std() == pytest.approx(0.2, rel=0.4)


def test_trained_length_keeps_its_positions_untouched():
    embeddings = tiny_tower().embeddings
    assert torch.equal(embeddings.positions(6).flatten(1, 2), embeddings.position_embeddings)


@pytest.mark.parametrize("columns", [3, 4, 9])
def test_other_lengths_interpolate_time_and_leave_mel_alone(columns):
    """Linear interpolation between patch centres, constant at the ends, for each mel row and dimension."""
    embeddings = tiny_tower().embeddings
    nn.init.normal_(embeddings.position_embeddings, generator=torch.Generator().manual_seed(3))
    grid = embeddings.position_embeddings.detach().numpy().reshape(2, 6, WIDTH)
    centres = (np.arange(columns) + 0.5) * 6 / columns - 0.5
    expected = np.empty((2, columns, WIDTH))
    for row in range(2):
        for dimension in range(WIDTH):
            expected[row, :, dimension] = np.interp(centres, np.arange(6), grid[row, :, dimension])
    interpolated = embeddings.positions(columns)[0].detach().numpy()
    np.testing.assert_allclose(interpolated, expected, atol=1e-5)


def padded_clips(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random clips with the given numbers of frames, padded with noise that must have no effect, and their mask."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(len(lengths), max(lengths), 32, generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return features, mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_clips_equal_clips_alone(attention, side):
    tower = tiny_tower()
    tower.set_attn_implementation(attention)
    lengths = [32, 128, 96, 64]
    features, mask = padded_clips(lengths)
    if side == "left":  # as `pipeline` pads
        features, mask = features.flip(1), mask.flip(1)
    with torch.no_grad():
        together = tower(features, mask).last_hidden_state
        keep = tower.token_mask(mask)
        assert keep.sum(-1).tolist() == [2 * length // 16 for length in lengths]
        for clip, tokens, kept, length in zip(features, together, keep, lengths, strict=True):
            counted = clip[:length] if side == "right" else clip[-length:]
            alone = tower(counted[None]).last_hidden_state[0]
            assert (tokens[kept] - alone).abs().max() < 1e-5


def test_full_mask_changes_nothing():
    tower = tiny_tower()
    features, mask = padded_clips([96, 96])
    with torch.no_grad():
        difference = tower(features, mask).last_hidden_state - tower(features).last_hidden_state
    assert difference.abs().max() < 1e-6


def test_eager_attention_equals_sdpa():
    tower = tiny_tower()
    features, mask = padded_clips([96, 64])
    outputs = {}
    with torch.no_grad():
        for attention in ("eager", "sdpa"):
            tower.set_attn_implementation(attention)
            assert tower.config._attn_implementation == attention
            outputs[attention] = tower(features, mask).last_hidden_state[tower.token_mask(mask)]
    assert (outputs["eager"] - outputs["sdpa"]).abs().max() < 1e-5


def test_attentions_and_hidden_states_are_recorded():
    tower = tiny_tower()
    tower.set_attn_implementation("eager")
    features, _ = padded_clips([96, 96])
    with torch.no_grad():
        outputs = tower(features, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 3
    for weights in outputs.attentions:
        assert weights.shape == (2, HEADS, 12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 12))
    assert len(outputs.hidden_states) == 4  # embeddings, and after each of three blocks
    assert torch.equal(tower.proj(tower.norm(outputs.hidden_states[-1])), outputs.last_hidden_state)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients, runs = [], []
    features, mask = padded_clips([96, 64])
    for checkpointing in (False, True):
        tower = tiny_tower().train()
        if checkpointing:
            tower.activation_checkpointing_enable()
        calls = []
        for layer in tower.modules():
            if isinstance(layer, CavMaeAttention):
                layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tower(features, mask).last_hidden_state.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
        runs.append(len(calls))
    assert runs == [3, 6]  # recomputed in the backward pass
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 or name.endswith("k_proj.bias"), name  # softmax ignores a bias of the keys
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("shape", [(96, 32), (1, 96, 64), (1, 90, 32)])
def test_wrong_spectrogram_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"a multiple of 16 frames, 32 mel bins), got {shape}")):
        tiny_tower()(torch.zeros(shape))


def test_half_precision_tower_takes_float32_spectrograms():
    tower = tiny_tower().to(torch.bfloat16)
    features, mask = padded_clips([96, 64])
    with torch.no_grad():
        assert tower(features, mask).last_hidden_state.dtype == torch.bfloat16


def test_blocks_are_pre_norm():
    """A block is the identity if the last weights of its attention and feed-forward layers are zero."""
    torch.manual_seed(0)
    layer = CavMaeLayer(tiny_config(attn_implementation="eager"))
    for linear in (layer.attention.o_proj, layer.mlp.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    hidden_states = torch.randn(1, 5, WIDTH)
    assert torch.equal(layer(hidden_states), hidden_states)
