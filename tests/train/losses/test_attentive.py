import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dali_llava.train.losses import AlignmentAttention, AttentiveTransportLoss, TransportLoss
from dali_llava.train.losses.attentive import ATTENTION_WEIGHTS, load_alignment_attention, save_alignment_attention
from dali_llava.train.transport import solve_transport


def tokens(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    audio, image = (torch.randn(3, n, 16, generator=generator, dtype=torch.float64) for n in (6, 5))
    return audio.to(dtype).requires_grad_(), (image + 0.5).to(dtype).requires_grad_()


def make(epoch=2, temperature=0.05, dtype=torch.float64, **options):
    """With a small temperature, the weights of an untrained attention differ."""
    torch.manual_seed(0)
    loss = AttentiveTransportLoss(16, num_heads=4, temperature=temperature, **options).to(dtype)
    for name, parameter in loss.named_parameters():
        if name.endswith("bias"):  # biases of the attention start at 0, where they would not be tested
            torch.nn.init.normal_(parameter, std=0.1)
    loss.set_epoch(epoch)
    return loss


def naive_attention(attention, query, key, value):
    """Multi-head attention (Vaswani et al., 2017) of one sample, one head at a time."""
    width, heads = query.shape[1], attention.num_heads
    size = width // heads
    q, k, v = (
        F.linear(tensor, weight, bias)
        for tensor, weight, bias in zip(
            (query, key, value),
            attention.in_proj_weight.split(width),
            attention.in_proj_bias.split(width),
            strict=True,
        )
    )
    outputs = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        outputs.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(1) @ v[:, part])
    return attention.out_proj(torch.cat(outputs, dim=1))


def naive_weights(loss, audio, image):
    """Weights before mixing, one sample at a time."""
    m = loss.attention
    a, b = [], []
    for x, y in zip(audio, image, strict=True):
        u = naive_attention(m.audio_attention, m.audio_query(x), m.image_key(y), m.image_value(y))
        w = naive_attention(m.image_attention, m.image_query(y), m.audio_key(x), m.audio_value(x))
        a.append((u.mean(1) / m.temperature).softmax(0))
        b.append((w.mean(1) / m.temperature).softmax(0))
    return torch.stack(a), torch.stack(b)


def test_weights_equal_the_definition():
    loss, (audio, image) = make(), tokens()
    a, b = loss.weights(audio, image)
    for got, expected in zip((a, b), naive_weights(loss, audio, image), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
        assert got.std() > 0.01
    torch.testing.assert_close(a.sum(1), torch.ones(3, dtype=torch.float64))


def test_what_is_learnt():
    """Six linear layers with bias and two attentions."""
    sizes = {name: parameter.numel() for name, parameter in AttentiveTransportLoss(16).named_parameters()}
    assert sum(sizes.values()) == 6 * (16 * 16 + 16) + 2 * 4 * (16 * 16 + 16)
    assert all(name.startswith("attention.") for name in sizes)
    assert AttentiveTransportLoss(16).attention.temperature == 20
    assert AttentiveTransportLoss(16).attention.audio_attention.num_heads == 8


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_parameter_gradients_equal_the_definition(dtype, tolerance):
    """d(OT(a, b) - lambda (H(a) + H(b))) / d theta, with OT's potentials as the derivative by the weights."""
    loss, (audio, image) = make(dtype=dtype), tokens(dtype=dtype)
    output = loss(audio, image)
    parameters = list(loss.parameters())
    gradients = torch.autograd.grad(output.loss, parameters)

    wide = make(dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in loss.state_dict().items()})
    x, y = audio.detach().double(), image.detach().double()
    a, b = naive_weights(wide, x, y)
    a, b = a / 2 + 1 / 12, b / 2 + 1 / 10
    solved = solve_transport(x, y, a.detach(), b.detach())
    u, v = solved.potentials
    entropy_a, entropy_b = (-(weights * weights.log()).sum(1).mean() for weights in (a, b))
    distance = (x[:, :, None] - y[:, None]).square().sum(-1).mean()
    value = solved.cost.mean() - 0.25 * distance * (entropy_a + entropy_b)
    objective = ((a * u).sum(1) + (b * v).sum(1)).mean() - 0.25 * distance * (entropy_a + entropy_b)
    torch.testing.assert_close(output.loss.double(), value, rtol=tolerance, atol=0)
    expected = torch.autograd.grad(objective, list(wide.parameters()))
    largest = max(gradient.abs().max().item() for gradient in expected)
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * largest)
    assert output.logs.pop("transport_seconds") > 0
    assert output.logs == pytest.approx(
        {
            "transport_cost": solved.cost.mean().item(),
            "mean_distance": distance.item(),
            "max_gap": 0.0,
            "lambda": 0.25 * distance.item(),
            "entropy_audio": entropy_a.item(),
            "entropy_image": entropy_b.item(),
        },
        rel=1e-5,
    )


def test_parameter_gradient_by_finite_differences():
    loss, (audio, image) = make(epoch=6), tokens()
    bias = loss.attention.audio_attention.out_proj.weight
    (gradient,) = torch.autograd.grad(loss(audio, image).loss, bias)
    step = torch.randn(bias.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            bias += sign * 1e-6 * step
            values.append(loss(audio, image).loss.item())
            bias -= sign * 1e-6 * step
    assert (gradient * step).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_tokens_get_the_gradient_of_transport_alone():
    loss, (audio, image) = make(), tokens()
    got = torch.autograd.grad(loss(audio, image).loss, (audio, image))
    with torch.no_grad():
        a, b = loss.weights(audio, image)
        a, b = a / 2 + 1 / 12, b / 2 + 1 / 10
    expected = torch.autograd.grad(solve_transport(audio, image, a, b).cost.mean(), (audio, image))
    for gradient, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-14)


def test_no_mixed_weight_falls_below_half_of_uniform():
    """The entropy is that of the mixed weights, even if the attention selects one token."""
    loss, (audio, image) = make(temperature=1e-6), tokens()
    logs = loss(audio, image).logs
    for name, count in (("entropy_audio", 6), ("entropy_image", 5)):
        rest, top = 0.5 / count, 0.5 + 0.5 / count
        expected = -top * math.log(top) - (count - 1) * rest * math.log(rest)
        assert logs[name] == pytest.approx(expected, rel=1e-6)


def test_schedule():
    loss = make(epoch=1)
    relative = []
    for epoch in range(1, 9):
        loss.set_epoch(epoch)
        relative.append(loss.relative_lambda)
    assert relative == [0.0, 0.25, 0.2, 0.15, 0.1, 0.05, 0.05, 0.05]


def test_first_epoch_is_plain_transport():
    loss, (audio, image) = make(epoch=1), tokens()
    output = loss(audio, image)
    plain = TransportLoss()(audio, image)
    torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=0)
    assert output.logs["lambda"] == 0
    assert output.logs["entropy_audio"] == pytest.approx(math.log(6))
    output.loss.backward()
    assert all((parameter.grad == 0).all() for parameter in loss.parameters())


def test_evaluation_is_plain_transport_in_any_epoch():
    loss, (audio, image) = make(epoch=5).eval(), tokens()
    output = loss(audio, image)
    torch.testing.assert_close(output.loss, TransportLoss()(audio, image).loss, rtol=0, atol=0)
    assert output.logs["lambda"] == 0


def test_attention_that_was_cast_to_bfloat16_weights_as_in_float32():
    """The attention computes in the dtype of its parameters; its softmax and the transport stay in float32."""
    loss, (audio, image) = make(dtype=torch.bfloat16), tokens(dtype=torch.bfloat16)
    output = loss(audio, image)
    output.loss.backward()
    wide = make(dtype=torch.bfloat16).float()
    for found, expected in zip(loss.weights(audio, image), wide.weights(audio, image), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0)
        torch.testing.assert_close(found.sum(1), torch.ones(3))
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, wide(audio, image).loss, rtol=1e-2, atol=0)
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in loss.named_parameters() if "query" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epoch", [1, 2])
def test_modules_of_the_attention_run_in_every_epoch(epoch, dtype):
    """Engines that shard parameters gather them in the hooks of these modules."""
    loss, (audio, image) = make(epoch=epoch, dtype=dtype), tokens(dtype=torch.float32)
    ran = []
    for name, module in loss.attention.named_children():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    loss(audio, image)
    assert sorted(ran) == sorted(name for name, _ in loss.attention.named_children())


def test_sinkhorn_will_do():
    loss, (audio, image) = make(solver="sinkhorn"), tokens()
    output = loss(audio, image)
    exact = make()(audio, image)
    assert 0 <= output.logs["transport_cost"] - exact.logs["transport_cost"] <= 3 * output.logs["max_gap"]


def test_it_learns_to_lower_its_objective():
    loss, (audio, image) = make(dtype=torch.float32), tokens(dtype=torch.float32)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    values = []
    for _ in range(20):
        value = loss(audio.detach(), image.detach()).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


def test_attention_learns_from_masked_clips_as_from_shorter_ones():
    audio, image = tokens(9)
    audio_mask = torch.tensor([[True, True, False, True, True, False]] * 3)
    image_mask = torch.tensor([[True, False, True, True, True]] * 3)
    found = []
    for arguments in (
        (audio, image, audio_mask, image_mask),
        (audio[:, audio_mask[0]], image[:, image_mask[0]]),
    ):
        loss = make(epoch=3)
        found.append(torch.autograd.grad(loss(*arguments).loss, tuple(loss.parameters())))
    for masked, removed in zip(*found, strict=True):
        assert masked.abs().max() > 0
        torch.testing.assert_close(masked, removed, rtol=1e-9, atol=1e-12)


def test_image_map_is_the_weights_on_the_grid():
    loss = make()
    audio, image = tokens(8)
    image = torch.cat((image, image[:, :1] - 1), dim=1)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    _, weights = loss.weights(audio, image, mask)
    found = loss.attention.image_map(audio, image, mask, grid=(2, 3))
    assert not found.requires_grad
    torch.testing.assert_close(found, (6 * weights.detach()).reshape(3, 2, 3), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, loss.attention.image_map(audio[:, :4], image, grid=(2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.mean((1, 2)), torch.ones(3, dtype=torch.float64))
    assert loss.attention.image_map(audio, image[:, :4]).shape == (3, 2, 2)


@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_image_map_of_tokens_that_fill_no_grid(grid):
    with pytest.raises(ValueError, match="5 image tokens do not fill a grid of 2 x 2"):
        make().attention.image_map(*tokens(), grid=grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 12}, "width must be a multiple of num_heads"),
        ({"width": 16, "temperature": 0.0}, "temperature"),
        ({"width": 16, "entropy_schedule": ()}, "entropy_schedule"),
        ({"width": 16, "entropy_schedule": (-0.1,)}, "entropy_schedule"),
        ({"width": 16, "solver": "simplex"}, "unknown solver"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AttentiveTransportLoss(**options)


def test_epochs_count_from_one():
    with pytest.raises(ValueError, match="no epoch 0"):
        make(epoch=0)


# Loss and gradients of two of four pairs on each rank, with the same random weights on both ranks.
RANK = """
from dali_llava.train.losses import AttentiveTransportLoss

torch.manual_seed(0)
loss = AttentiveTransportLoss(16, num_heads=4, temperature=0.05).double()
loss.set_epoch(3)
audio, image = (torch.tensor(batch, dtype=torch.float64)[2 * rank :][:2].requires_grad_() for batch in given)
output = loss(audio, image)
output.loss.backward()
parameters = {name: parameter.grad.tolist() for name, parameter in loss.named_parameters()}
tokens = {"audio": audio.grad.tolist(), "image": image.grad.tolist()}
results = {"loss": output.loss.item(), "lambda": output.logs["lambda"], "parameters": parameters, **tokens}
"""


def test_two_ranks_make_one_batch(on_two_ranks):
    """The mean of the ranks' losses and gradients, as in DistributedDataParallel, equals that of the whole batch.

    The clouds of the second rank are farther apart, so that lambda differs from that of either rank alone.
    """
    generator = torch.Generator().manual_seed(0)
    audio, image = (torch.randn(4, n, 16, generator=generator, dtype=torch.float64) for n in (6, 5))
    image[2:] += 3
    first, second = on_two_ranks(RANK, [audio.tolist(), image.tolist()])

    torch.manual_seed(0)
    loss = AttentiveTransportLoss(16, num_heads=4, temperature=0.05).double()
    loss.set_epoch(3)
    output = loss(audio.requires_grad_(), image.requires_grad_())
    output.loss.backward()
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(output.loss.item(), rel=1e-12)
    assert first["lambda"] == second["lambda"] == pytest.approx(output.logs["lambda"], rel=1e-12)
    for name, parameter in loss.named_parameters():
        averaged = sum(torch.tensor(each["parameters"][name], dtype=torch.float64) for each in (first, second)) / 2
        torch.testing.assert_close(averaged, parameter.grad, rtol=1e-10, atol=1e-12)
    for name, expected in (("audio", audio.grad), ("image", image.grad)):
        gathered = torch.tensor(first[name] + second[name], dtype=torch.float64) / 2
        torch.testing.assert_close(gathered, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_attention_is_the_same_bit_for_bit(tmp_path, dtype):
    attention = make(temperature=0.3, dtype=dtype).attention
    save_alignment_attention(attention, tmp_path / "stage")
    assert [path.name for path in (tmp_path / "stage").iterdir()] == [ATTENTION_WEIGHTS]
    loaded = load_alignment_attention(tmp_path / "stage")
    expected, found = attention.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in expected)
    assert (loaded.num_heads, loaded.temperature) == (4, 0.3)
    audio, image = tokens(dtype=dtype)
    weights = zip(loaded(audio, image), attention(audio, image), strict=True)
    assert all(torch.equal(got, wanted) for got, wanted in weights)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_an_attention_draws_no_random_number(tmp_path):
    save_alignment_attention(AlignmentAttention(16), tmp_path)
    state = torch.get_rng_state()
    load_alignment_attention(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_attention_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{ATTENTION_WEIGHTS}: no such file; .* objective ot_att"):
        load_alignment_attention(tmp_path)


def test_damaged_attention_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / ATTENTION_WEIGHTS).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=f"{ATTENTION_WEIGHTS} is damaged"):
        load_alignment_attention(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("audio_query.bias"), "'audio_query.bias'"),
        (lambda tensors: tensors.pop("image_key.weight"), "Missing key.*image_key.weight"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "Unexpected key.*more"),
        (lambda tensors: tensors.update({"image_key.bias": torch.zeros(3)}), "size mismatch for image_key.bias"),
        (lambda tensors: tensors.update({"audio_query.bias": torch.zeros(6)}), "width must be a multiple"),
    ],
)
def test_attention_of_another_shape_is_an_error_that_names_the_file(tmp_path, change, message):
    save_alignment_attention(AlignmentAttention(16), tmp_path)
    tensors = load_file(tmp_path / ATTENTION_WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / ATTENTION_WEIGHTS, metadata={"num_heads": "8", "temperature": "20.0"})
    with pytest.raises(ValueError, match=f"{ATTENTION_WEIGHTS} does not hold an alignment's attention: .*{message}"):
        load_alignment_attention(tmp_path)


def test_attention_without_its_options_is_an_error(tmp_path):
    save_file(AlignmentAttention(16).state_dict(), tmp_path / ATTENTION_WEIGHTS)
    with pytest.raises(ValueError, match="does not hold an alignment's attention: 'num_heads'"):
        load_alignment_attention(tmp_path)
