"""Fusions: values and gradients against independent implementations, masks, and the registry."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.modeling.fusion import FUSIONS, Fusion, build_fusion, register_fusion
from dali_llava.modeling.fusion_inputs import FusionInputs, split_by_sample


WIDTH = 16
OPTIONS = {
    "shared_projector": {},
    "ot_attention": {},
    "cross_attention": {"num_attention_heads": 4},
    "joint_encoder": {"num_attention_heads": 4, "num_layers": 2},
    "q_former": {"num_attention_heads": 4},
}


def tokens(*counts: int, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    """Random tokens of samples with `counts` tokens, each (count, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for count in counts]


def build(name: str, dtype=torch.float64) -> Fusion:
    torch.manual_seed(0)
    fusion = build_fusion(name, WIDTH, OPTIONS[name]).to(dtype)
    for weight in fusion.parameters():  # biases and norms too
        nn.init.normal_(weight, std=0.3)
    return fusion


def naive_assignment(x: np.ndarray, y: np.ndarray, eps: float = 0.1, iterations: int = 50) -> np.ndarray:
    """Equations 2 and 3: Sinkhorn's scaling of exp(S / eps) to marginals 1/N and 1/M, for tokens of unit length."""
    kernel = np.exp(np.array([[float(np.dot(a, b)) for b in y] for a in x]) / eps)
    v = np.ones(len(y))
    for _ in range(iterations):
        u = (1 / len(x)) / (kernel @ v)
        v = (1 / len(y)) / (kernel.T @ u)
    return u[:, None] * kernel * v


def naive_ot_attention(x, y, assignment, rescale: bool, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Equation 5, token by token, for a given assignment."""
    if normalize:
        x, y = unit(x), unit(y)
    row, column = (len(x), len(y)) if rescale else (1, 1)
    by_audio = [x[i] + row * sum(assignment[i, j] * y[j] for j in range(len(y))) for i in range(len(x))]
    by_image = [y[j] + column * sum(assignment[i, j] * x[i] for i in range(len(x))) for j in range(len(y))]
    return np.stack(by_audio), np.stack(by_image)


def unit(x: np.ndarray) -> np.ndarray:
    return np.stack([token / np.sqrt(np.sum(token**2)) for token in x])


def difference_quotients(function, value: np.ndarray, step: float = 1e-5) -> np.ndarray:
    gradient = np.zeros_like(value)
    for index in np.ndindex(value.shape):
        change = np.zeros_like(value)
        change[index] = step
        gradient[index] = (function(value + change) - function(value - change)) / (2 * step)
    return gradient


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_audio", "num_frames"), [(5, 3), (4, 1), (1, 1)])
def test_ot_attention_equals_the_equations(rescale, normalize, num_audio, num_frames):
    """Values and gradients, in float64 to 1e-6 and in float32 to 1e-5; the assignment is a constant."""
    (x,), (y,) = tokens(num_audio), tokens(num_frames, seed=1)
    weights = [torch.randn_like(x), torch.randn_like(y)]
    assignment = naive_assignment(unit(x.numpy()), unit(y.numpy()))

    def naive_sum(x, y):
        outputs = naive_ot_attention(x, y, assignment, rescale, normalize)
        return sum(float(np.sum(weight.numpy() * output)) for weight, output in zip(weights, outputs, strict=True))

    expected = naive_ot_attention(x.numpy(), y.numpy(), assignment, rescale, normalize)
    gradients = (
        difference_quotients(lambda value: naive_sum(value, y.numpy()), x.numpy()),
        difference_quotients(lambda value: naive_sum(x.numpy(), value), y.numpy()),
    )
    fusion = build_fusion("ot_attention", WIDTH, {"rescale": rescale, "normalize": normalize})
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        inputs = [value.to(dtype)[None].clone().requires_grad_() for value in (x, y)]
        outputs = fusion(*inputs, *(torch.ones(1, len(value), dtype=torch.bool) for value in (x, y)))
        sum((w.to(dtype) * output[0]).sum() for w, output in zip(weights, outputs, strict=True)).backward()
        for output, value, tensor, gradient in zip(outputs, expected, inputs, gradients, strict=True):
            assert output.dtype == dtype
            np.testing.assert_allclose(output[0].detach().numpy(), value, rtol=0, atol=tolerance)
            np.testing.assert_allclose(tensor.grad[0].numpy(), gradient, rtol=0, atol=tolerance)


def test_rescaled_ot_attention_adds_a_mean_with_weight_one():
    audio, image = torch.stack(tokens(6)), F.normalize(torch.ones(1, 4, WIDTH, dtype=torch.float64), dim=2)
    masks = torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    added = []
    for rescale in (True, False):
        fused, _ = build_fusion("ot_attention", WIDTH, {"rescale": rescale})(audio, image, *masks)
        added.append(fused - F.normalize(audio, dim=2))
    torch.testing.assert_close(added[0], image[:, :1].expand(-1, 6, -1))
    torch.testing.assert_close(added[1], image[:, :1].expand(-1, 6, -1) / 6)


def test_ot_attention_is_computed_in_float32_under_autocast():
    audio, image = (torch.stack(tokens(4, seed=seed, dtype=torch.bfloat16)) for seed in (0, 1))
    masks = [torch.ones(1, 4, dtype=torch.bool)] * 2
    fusion = build_fusion("ot_attention", WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion(audio, image, *masks)
    expected = fusion(audio.float(), image.float(), *masks)
    assert all(torch.equal(tensor, value) for tensor, value in zip(fused, expected, strict=True))


def torch_attention(attention) -> nn.MultiheadAttention:
    """The attention of torch with the same weights."""
    twin = nn.MultiheadAttention(WIDTH, 4, batch_first=True, dtype=torch.float64)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    twin.load_state_dict(
        {
            "in_proj_weight": torch.cat([projection.weight for projection in projections]),
            "in_proj_bias": torch.cat([projection.bias for projection in projections]),
            "out_proj.weight": attention.o_proj.weight,
            "out_proj.bias": attention.o_proj.bias,
        }
    )
    return twin


def test_cross_attention_equals_that_of_torch():
    fusion = build("cross_attention")
    inputs = FusionInputs.from_samples(tokens(5, 3), tokens(2, 4, seed=1))
    audio, image = fusion(*inputs.to_tuple())
    attended, _ = torch_attention(fusion.attention)(
        inputs.audio_tokens, inputs.image_tokens, inputs.image_tokens, key_padding_mask=~inputs.image_mask
    )
    torch.testing.assert_close(audio, inputs.audio_tokens + attended)
    assert torch.equal(image, inputs.image_tokens)


def test_joint_encoder_equals_the_layers_of_torch():
    fusion = build("joint_encoder")
    audio, image = torch.stack(tokens(5, 5)), torch.stack(tokens(3, 3, seed=1))
    expected = torch.cat([audio, image], dim=1)
    for layer in fusion.layers:
        twin = nn.TransformerEncoderLayer(
            *(WIDTH, 4, 4 * WIDTH, 0.0, "gelu"), layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        state = {f"self_attn.{name}": value for name, value in torch_attention(layer.attention).state_dict().items()}
        for name in ("norm1", "norm2"):
            state |= {f"{name}.{key}": value for key, value in getattr(layer, name).state_dict().items()}
        for name, module in (("linear1", layer.mlp.fc1), ("linear2", layer.mlp.fc2)):
            state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        twin.load_state_dict(state)
        expected = twin(expected)
    expected = F.layer_norm(expected, (WIDTH,), fusion.norm.weight, fusion.norm.bias, 1e-6)
    masks = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    fused = fusion(audio, image, *masks)
    torch.testing.assert_close(torch.cat(fused, dim=1), expected)


def test_q_former_equals_window_by_window():
    fusion = build("q_former")
    (audio,), (image,) = tokens(5), tokens(4, seed=1)

    def window_by_window(sequence):
        outputs = []
        for start in range(0, len(sequence), 2):
            window, query = sequence[start : start + 2][None], fusion.query.weight[None]
            for layer in fusion.layers:
                attended, _ = torch_attention(layer.attention)(query, window, window)
                query = layer.norm1(query + attended)
                query = layer.norm2(query + layer.fc2(F.gelu(layer.fc1(query))))
            outputs += [query[0, 0]] * window.shape[1]
        return torch.stack(outputs)

    inputs = FusionInputs.from_samples([audio], [image])
    for fused, sequence in zip(fusion(*inputs.to_tuple()), (audio, image), strict=True):
        torch.testing.assert_close(fused[0], window_by_window(sequence))


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_tokens_equal_removed_tokens(name):
    """Samples of different lengths, with one frame, without images, and without audio, together and one by one."""
    fusion = build(name)
    audio, image = tokens(6, 5, 4, 0, 1), tokens(2, 1, 0, 3, 1, seed=1)
    inputs = FusionInputs.from_samples(audio, image)
    for padded, mask in ((inputs.audio_tokens, inputs.audio_mask), (inputs.image_tokens, inputs.image_mask)):
        padded[~mask] = 9.0
    together = fusion(*inputs.to_tuple())
    for row, pair in enumerate(zip(audio, image, strict=True)):
        alone = fusion(*FusionInputs.from_samples(*([own] for own in pair)).to_tuple())
        for batched, single, own in zip(together, alone, pair, strict=True):
            torch.testing.assert_close(batched[row, : len(own)], single[0, : len(own)])
            assert torch.isfinite(single[0, : len(own)]).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_finite_and_reach_every_weight(name):
    """Also without images, where each weight of the fusion still receives a gradient."""
    fusion = build(name)
    for image in (tokens(2, 0, seed=1), tokens(0, 0)):
        samples = [value.requires_grad_() for value in (*tokens(3, 2), *image)]
        inputs = FusionInputs.from_samples(samples[:2], samples[2:])
        fusion.zero_grad()
        audio, image = fusion(*inputs.to_tuple())
        (audio[inputs.audio_mask].square().sum() + image[inputs.image_mask].square().sum()).backward()
        gradients = [value.grad for value in (*samples[:2], *fusion.parameters())]
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", OPTIONS)
def test_audio_depends_on_the_images_where_the_modalities_are_fused(name):
    fusion, audio = build(name), tokens(4)
    first, other = (fusion(*FusionInputs.from_samples(audio, tokens(3, seed=seed)).to_tuple())[0] for seed in (1, 2))
    # The Q-Former summarises each modality, and a shared projector changes nothing.
    assert torch.allclose(first, other) == (name in ("shared_projector", "q_former"))


def test_audio_alone_is_of_unit_length_under_ot_attention():
    audio = tokens(4)
    fused, _ = build("ot_attention")(*FusionInputs.from_samples(audio, tokens(0)).to_tuple())
    torch.testing.assert_close(fused[0], F.normalize(audio[0], dim=1))


def test_samples_with_both_modalities_are_selected():
    inputs = FusionInputs.from_samples(tokens(3, 2, 4), tokens(2, 0, 1, seed=1))
    both = inputs.with_both()
    assert both.audio_mask.sum(1).tolist() == [3, 4] and both.image_mask.sum(1).tolist() == [2, 1]
    assert torch.equal(both.audio_tokens, inputs.audio_tokens[[0, 2]])
    assert FusionInputs.from_samples(tokens(3), tokens(0)).with_both() is None


def test_media_go_to_the_samples_of_their_placeholders():
    media = tokens(2, 3, 1)
    by_sample = split_by_sample(media, [5, 0, 1], "audio")
    assert [list(map(id, own)) for own in by_sample] == [[id(media[0]), id(media[1])], [], [id(media[2])]]
    with pytest.raises(ValueError, match="contains 5 audio placeholders for 6 audio tokens"):
        split_by_sample(media, [5, 0, 0], "audio")
    with pytest.raises(ValueError, match="sample 0 contains 4 image placeholders for 5 image tokens"):
        split_by_sample(media, [4, 2], "image")


class Offset(Fusion):
    """Adds a constant to the audio tokens."""

    def __init__(self, width: int, amount: float = 1.0):
        super().__init__(width)
        self.amount = amount

    def forward(self, audio, image, audio_mask, image_mask):
        return audio + self.amount, image


def test_another_package_registers_a_fusion(monkeypatch, tiny_config):
    monkeypatch.setattr("dali_llava.modeling.fusion.FUSIONS", registry := dict(FUSIONS))
    register_fusion("offset", Offset)
    register_fusion("offset", Offset)
    assert registry["offset"] is Offset
    config = LlavaAudioConfig(**{**tiny_config.to_dict(), "fusion": "offset", "fusion_options": {"amount": 2.0}})
    assert LlavaAudioConfig.from_dict(config.to_dict()).fusion_options == {"amount": 2.0}
    assert build_fusion("offset", 4, {"amount": 2.0}).amount == 2.0
    for name in ("offset", "ot_attention", "concatenate"):
        with pytest.raises(ValueError, match=f"fusion '{name}' is already registered"):
            register_fusion(name, type("Other", (Fusion,), {}))
    with pytest.raises(TypeError, match="'linear': .*Linear.* is not a subclass of Fusion"):
        register_fusion("linear", nn.Linear)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion": "average"}, "fusion 'average' is unknown; known fusions: concatenate, shared_projector, ot_att"),
        ({"fusion": "ot_attention", "fusion_options": {"epsilon": 1}}, "no option epsilon; its options: eps, num_it"),
        ({"fusion": "ot_attention", "fusion_options": {"eps": 0}}, "eps and num_iterations must be positive, not 0"),
        ({"fusion": "ot_attention", "fusion_options": {"eps": "a"}}, "fusion_options of 'ot_attention': "),
        ({"fusion_options": {"eps": 1}}, "'concatenate' has no option eps; its options: none"),
        ({"fusion": "q_former", "fusion_options": {"num_attention_heads": 4, "window": 0}}, "window must be at least"),
        ({"fusion": "cross_attention"}, r"num_attention_heads \(12\) must divide the width of the tokens \(32\)"),
        ({"fusion": "joint_encoder"}, r"num_attention_heads \(12\) must divide the width of the tokens \(32\)"),
        ({"vision_pooling": "frame"}, "vision_pooling 'frame' needs a fusion, not 'concatenate'"),
        ({"vision_pooling": "mean"}, "vision_pooling 'mean' is unknown; choose patches or frame"),
        (
            {"vision_pooling": "frame", "fusion": "ot_attention"},
            r"audio_config.output_size \(32\) must equal the image tokens' width \(512\)",
        ),
    ],
)
def test_wrong_configurations_are_refused(tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        LlavaAudioConfig(**{**tiny_config.to_dict(), **fields})


def test_frame_vectors_need_a_projection(tiny_config):
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="needs vision_config.projection_dim, which 'siglip_vision_model' does not"):
        LlavaAudioConfig(
            **{
                **tiny_config.to_dict(),
                "vision_config": vision,
                "vision_pooling": "frame",
                "fusion": "ot_attention",
            }
        )
