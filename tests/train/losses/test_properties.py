"""Properties of the losses for any tokens and masks, down to one token and one sample."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dali_llava.modeling.sinkhorn import log_assignment
from dali_llava.train.losses import (
    AlignmentLoss,
    AttentiveTransportLoss,
    ContrastiveLoss,
    MMDLoss,
    TokenAssignmentLoss,
    TransportLoss,
)
from dali_llava.train.transport import solve_transport


SETTINGS = settings(max_examples=20, deadline=None, derandomize=True)
# Sums of about ten terms in another order differ by about 1e-15 of the largest. The softmaxes of the attention and of
# InfoNCE multiply that by their logits, a few hundred at most, and a mean token may be shorter than its tokens.
TOLERANCE = 1e-10
# Half the step of a central difference, relative to the largest token value. The rounding error divided by it, about
# 1e-9 of the value, equals the third derivative times its square. The tolerance allows for both.
STEP, SLOPE_TOLERANCE = 1e-6, 1e-6
MULTIPLES = (1 / 4, 1 / 2, 1, 2, 4)

PER_PAIR = ["mmd", "ot", "ot_att in epoch 1", "assignment", "assignment, reference"]
ALL = [*PER_PAIR, "ot_att in epoch 3", "contrastive"]
seeds = st.integers(0, 2**31)


@st.composite
def pairs(draw, coinciding: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio tokens (B, Na, D) and image tokens (B, Nv, D), float64, for which all plans have different costs.

    If `coinciding`, some tokens lie on a grid, where tokens coincide and plans tie.
    """
    generator = torch.Generator().manual_seed(draw(seeds))
    batch, width, scale = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4])), draw(st.sampled_from([1e-2, 1, 1e2]))
    counts = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    audio, image = (torch.randn(batch, n, width, generator=generator, dtype=torch.float64) for n in counts)
    image = image + 0.5
    if coinciding and draw(st.booleans()):
        audio, image = audio.round(), image.round()
    return scale * audio, scale * image


def size_of(audio: torch.Tensor, image: torch.Tensor) -> float:
    """Returns the largest coordinate."""
    return max(audio.abs().max().item(), image.abs().max().item()) + 1e-300


def unit_of(name: str, size: float) -> float:
    """Returns the unit of the loss: squared distances for transport, and 1 for the others."""
    return size**2 if name.startswith("ot") else 1.0


def make(name: str, audio: torch.Tensor, image: torch.Tensor) -> AlignmentLoss:
    """Builds the loss `name` for tokens of this width and dtype."""
    if name == "contrastive":
        assume(len(audio) > 1)  # one pair has no negatives and raises an error
        return ContrastiveLoss()
    if name.startswith("assignment"):
        return TokenAssignmentLoss("reference" if name.endswith("reference") else "paper").to(audio.dtype)
    if not name.startswith("ot_att"):
        return {"mmd": MMDLoss, "ot": TransportLoss}[name]()
    torch.manual_seed(0)
    # With a small temperature, the weights of an untrained attention differ.
    loss = AttentiveTransportLoss(audio.shape[2], num_heads=2, temperature=0.05 * size_of(audio, image))
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases start at 0, where they would not be tested
    loss.set_epoch(int(name[-1]))
    return loss.to(audio.dtype).train()


def value_and_gradients(loss, audio, image, *masks):
    audio, image = (tokens.detach().requires_grad_() for tokens in (audio, image))
    value = loss(audio, image, *masks).loss
    return value.detach(), *torch.autograd.grad(value, (audio, image))


def assert_same(got, wanted, unit: float, size: float) -> None:
    """Compares values to `TOLERANCE` in the loss's unit, and gradients in unit over size or the largest gradient."""
    torch.testing.assert_close(got[0], wanted[0], rtol=TOLERANCE, atol=TOLERANCE * unit)
    largest = max(unit / size, *(gradient.abs().max().item() for gradient in wanted[1:]))
    for gradient, other in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=TOLERANCE * largest)


def hide(tokens: torch.Tensor, count: int, value: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places the tokens in order at random positions among `count` tokens of `value`; also returns the mask."""
    batch, kept, width = tokens.shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, kept + count, generator=generator).argsort(dim=1) < kept
    padded = tokens.new_full((batch, kept + count, width), value)
    padded[mask] = tokens.flatten(0, 1)
    return padded, mask


@pytest.mark.parametrize("name", ALL)
@SETTINGS
@given(pair=pairs(), seed=seeds, counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_masked_tokens_are_as_good_as_removed(name, pair, seed, counts):
    loss = make(name, *pair)
    size = size_of(*pair)
    (audio, audio_mask), (image, image_mask) = (
        hide(tokens, count, 3 * size, seed) for tokens, count in zip(pair, counts, strict=True)
    )
    value, d_audio, d_image = value_and_gradients(loss, audio, image, audio_mask, image_mask)
    kept = [
        gradient[mask].view_as(tokens)
        for gradient, mask, tokens in ((d_audio, audio_mask, pair[0]), (d_image, image_mask, pair[1]))
    ]
    assert_same((value, *kept), value_and_gradients(loss, *pair), unit_of(name, size), size)
    assert (d_audio[~audio_mask] == 0).all() and (d_image[~image_mask] == 0).all()


@pytest.mark.parametrize("name", ALL)
@SETTINGS
@given(pair=pairs(), seed=seeds, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 1e-300]))
def test_masked_tokens_are_not_looked_at(name, pair, seed, garbage):
    """To the last bit."""
    loss = make(name, *pair)
    outcomes = []
    for value in (garbage, 0.0):
        (audio, audio_mask), (image, image_mask) = (hide(tokens, 2, value, seed) for tokens in pair)
        outcomes.append(value_and_gradients(loss, audio, image, audio_mask, image_mask))
    for got, expected in zip(*outcomes, strict=True):
        assert torch.equal(got, expected) and torch.isfinite(got).all()


@pytest.mark.parametrize("name", ALL)
@SETTINGS
@given(pair=pairs(), seed=seeds)
def test_order_of_tokens_does_not_matter(name, pair, seed):
    """The tokens of each sample are permuted differently, and the gradients with them."""
    loss = make(name, *pair)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.rand(tokens.shape[:2], generator=generator).argsort(dim=1) for tokens in pair]

    def ordered(tensors):
        return [tensor.take_along_dim(order[..., None], 1) for tensor, order in zip(tensors, orders, strict=True)]

    value, *gradients = value_and_gradients(loss, *pair)
    size = size_of(*pair)
    got = value_and_gradients(loss, *ordered(pair))
    assert_same(got, (value, *ordered(gradients)), unit_of(name, size), size)


@pytest.mark.parametrize("name", ["mmd", "ot", "ot_att in epoch 1"])
@SETTINGS
@given(pair=pairs(), seed=seeds, distance=st.sampled_from([1.0, 1e3]))
def test_a_common_shift_changes_nothing(name, pair, seed, distance):
    """A shift by a thousand times the size rounds the tokens to 1e-13 of it, well below the tolerance."""
    loss = make(name, *pair)
    size = size_of(*pair)
    generator = torch.Generator().manual_seed(seed)
    shift = distance * size * torch.randn(pair[0].shape[2], generator=generator, dtype=torch.float64)
    got = value_and_gradients(loss, *(tokens + shift for tokens in pair))
    assert_same(got, value_and_gradients(loss, *pair), unit_of(name, size), size)


@pytest.mark.parametrize("name", ["mmd", "ot", "ot_att in epoch 1", "contrastive"])
@SETTINGS
@given(pair=pairs())
def test_symmetric(name, pair):
    loss = make(name, *pair)
    audio, image = pair
    value, d_image, d_audio = value_and_gradients(loss, image, audio)
    size = size_of(*pair)
    assert_same((value, d_audio, d_image), value_and_gradients(loss, *pair), unit_of(name, size), size)


@SETTINGS
@given(pairs(coinciding=True))
def test_mmd_and_transport_are_not_negative(pair):
    """MMD is a sum of means of at most 5. Rounding may leave it a few 1e-15 below 0."""
    assert MMDLoss()(*pair).loss >= -1e-13
    assert TransportLoss()(*pair).loss >= 0


@pytest.mark.parametrize("name", ["mmd", "ot", "ot_att in epoch 1"])
@SETTINGS
@given(pair=pairs(coinciding=True), seed=seeds, times=st.integers(1, 2))
def test_one_cloud_in_any_order_and_multiplicity_is_at_zero(name, pair, seed, times):
    """Distances are differences of squared norms, so rounding leaves a few 1e-16 of the squared size, not 0."""
    audio, _ = pair
    order = torch.randperm(audio.shape[1] * times, generator=torch.Generator().manual_seed(seed))
    image = audio.repeat(1, times, 1)[:, order]
    value = make(name, audio, image)(audio, image).loss
    assert value.item() == pytest.approx(0, abs=1e-13 * unit_of(name, size_of(audio, image)))


def frozen(name: str, loss: AlignmentLoss, audio: torch.Tensor, image: torch.Tensor):
    """Returns the loss as a function of the tokens, with everything without gradient fixed at its current value."""
    if name == "mmd":
        joined = torch.cat((audio, image), dim=1)
        count, n = joined.shape[1], audio.shape[1]
        pairs_of_tokens = max(1, count * (count - 1))
        bandwidth = torch.cdist(joined, joined).square().sum(dim=(1, 2), keepdim=True) / pairs_of_tokens

        def mmd(x, y):
            z = torch.cat((x, y), dim=1)
            distances = (z[:, :, None] - z[:, None]).square().sum(dim=3)
            kernel = sum(torch.exp(-distances / (multiple * bandwidth)) for multiple in MULTIPLES)
            xx, xy, yy = (part.mean() for part in (kernel[:, :n, :n], kernel[:, :n, n:], kernel[:, n:, n:]))
            return xx - 2 * xy + yy

        return mmd
    if name.startswith("assignment"):
        similarity = F.normalize(audio, dim=2) @ F.normalize(image, dim=2).mT
        q, scale = log_assignment(similarity), loss.log_scale.detach()
        q, scale = (q, scale) if name.endswith("reference") else (q.exp(), scale.exp())

        def contrast(x, y):
            s = F.normalize(x, dim=2) @ F.normalize(y, dim=2).mT
            total = 0
            for q_m, s_m in ((q, s), (q.mT, s.mT)):
                # (B, i, j): q_i with s_j; the authors' code sums over the index of q.
                logits = scale * torch.einsum("bik,bjk->bij", q_m, s_m)
                normaliser = logits.logsumexp(dim=1 if name.endswith("reference") else 2)
                total = total + (normaliser - logits.diagonal(dim1=1, dim2=2)).mean()
            return total

        return contrast
    if name == "ot_att in epoch 3":
        with torch.no_grad():
            a, b = ((learnt + 1 / learnt.shape[1]) / 2 for learnt in loss.weights(audio, image))
            entropies = sum(torch.special.entr(weights).sum(dim=1).mean() for weights in (a, b))
        # The second value of the schedule, times the mean of all squared distances.
        strength = 0.2 * torch.cdist(audio, image).square().mean()
        return lambda x, y: solve_transport(x, y, a, b).cost.mean() - strength * entropies
    return lambda x, y: loss(x, y).loss


@pytest.mark.parametrize("name", ALL)
@SETTINGS
@given(pair=pairs(), seed=seeds)
def test_gradients_of_tokens_are_finite_differences(name, pair, seed):
    """Of the loss with MMD's bandwidth, the assignment, the attention's weights and lambda fixed."""
    loss = make(name, *pair)
    size = size_of(*pair)
    unit = unit_of(name, size)
    function = frozen(name, loss, *pair)
    value, *gradients = value_and_gradients(loss, *pair)
    torch.testing.assert_close(function(*pair), value, rtol=TOLERANCE, atol=TOLERANCE * unit)
    generator = torch.Generator().manual_seed(seed)
    along = [size * torch.randn(tokens.shape, generator=generator, dtype=torch.float64) for tokens in pair]
    with torch.no_grad():
        there, back = (
            function(*(tokens + step * part for tokens, part in zip(pair, along, strict=True))).item()
            for step in (STEP, -STEP)
        )
    expected = sum((gradient * part).sum().item() for gradient, part in zip(gradients, along, strict=True))
    largest = max(unit, size * max(gradient.norm().item() for gradient in gradients))
    assert (there - back) / (2 * STEP) == pytest.approx(expected, rel=0, abs=SLOPE_TOLERANCE * largest)


@pytest.mark.parametrize("name", ["ot_att in epoch 3", "assignment", "assignment, reference"])
@SETTINGS
@given(pair=pairs(), seed=seeds)
def test_gradients_of_parameters_are_finite_differences(name, pair, seed):
    """Of the whole loss with respect to all parameters: lambda and the assignment do not depend on them."""
    loss = make(name, *pair)
    parameters = list(loss.parameters())
    gradients = torch.autograd.grad(loss(*pair).loss, parameters)
    generator = torch.Generator().manual_seed(seed)
    along = [torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for parameter in parameters]
    values = []
    with torch.no_grad():
        for step in (STEP, -2 * STEP):  # the second back across the start
            for parameter, part in zip(parameters, along, strict=True):
                parameter += step * part
            values.append(loss(*pair).loss.item())
    expected = sum((gradient * part).sum().item() for gradient, part in zip(gradients, along, strict=True))
    largest = max(unit_of(name, size_of(*pair)), *(gradient.norm().item() for gradient in gradients))
    assert (values[0] - values[1]) / (2 * STEP) == pytest.approx(expected, rel=0, abs=SLOPE_TOLERANCE * largest)


@pytest.mark.parametrize("name", ALL)
@SETTINGS
@given(pair=pairs(), dtypes=st.tuples(*[st.sampled_from([torch.float16, torch.bfloat16])] * 2))
def test_half_precision_is_the_float32_loss_of_the_rounded_tokens(name, pair, dtypes):
    """Values are equal bit for bit, and gradients are those of float32, rounded. Audio and image dtypes may differ."""
    size = size_of(*pair)
    narrow = [
        (tokens / size).to(dtype) for tokens, dtype in zip(pair, dtypes, strict=True)
    ]  # the largest fp16 value is 65504
    wide = [tokens.float() for tokens in narrow]
    loss = make(name, *wide)
    value, *gradients = value_and_gradients(loss, *narrow)
    expected, *wide_gradients = value_and_gradients(loss, *wide)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    for gradient, of_wide, dtype in zip(gradients, wide_gradients, dtypes, strict=True):
        assert gradient.dtype == dtype and torch.equal(gradient, of_wide.to(dtype))


@pytest.mark.parametrize("name", PER_PAIR)
@SETTINGS
@given(pair=pairs(), seed=seeds)
def test_batch_is_the_mean_of_its_samples_alone(name, pair, seed):
    """Each sample has a different number of unmasked tokens. A sample alone gives its result in the batch."""
    loss = make(name, *pair)
    size = size_of(*pair)
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(tokens.shape[:2], generator=generator) < 0.7 for tokens in pair]
    for mask in masks:
        mask[~mask.any(dim=1)] = True
    value, *gradients = value_and_gradients(loss, *pair, *masks)
    batch = len(pair[0])
    alone = []
    for i in range(batch):
        own = [tokens[i : i + 1, mask[i]] for tokens, mask in zip(pair, masks, strict=True)]
        own_value, *own_gradients = value_and_gradients(loss, *own)
        alone.append(own_value)
        kept = [batch * gradient[i : i + 1, mask[i]] for gradient, mask in zip(gradients, masks, strict=True)]
        assert_same((own_value, *kept), (own_value, *own_gradients), unit_of(name, size), size)
    torch.testing.assert_close(value, torch.stack(alone).mean(), rtol=TOLERANCE, atol=TOLERANCE * unit_of(name, size))


@SETTINGS
@given(pairs())
def test_one_token_a_side(pair):
    """MMD's s is |x - y|^2. A single token has weight 1, entropy 0, and is assigned to itself."""
    audio, image = (tokens[:, :1] for tokens in pair)
    size = size_of(audio, image)
    difference = audio - image
    distances, batch = difference.square().sum(dim=2, keepdim=True), len(audio)
    pull = 4 / distances * sum(math.exp(-1 / multiple) / multiple for multiple in MULTIPLES)
    expected = {
        "mmd": (10 - 2 * sum(math.exp(-1 / multiple) for multiple in MULTIPLES), pull * difference),
        "assignment": (0.0, torch.zeros_like(audio)),
        "assignment, reference": (0.0, torch.zeros_like(audio)),
    }
    for name in ("ot", "ot_att in epoch 1", "ot_att in epoch 3"):
        expected[name] = distances.mean().item(), 2 * difference
    for name, (value, d_audio) in expected.items():
        value = torch.tensor(value, dtype=torch.float64)
        got = value_and_gradients(make(name, audio, image), audio, image)
        assert_same(got, (value, d_audio / batch, -d_audio / batch), unit_of(name, size), size)


@SETTINGS
@given(pairs())
def test_one_token_against_many(pair):
    """One token is moved to all others: transport is the mean squared distance, with its gradient."""
    audio, image = pair[0][:, :1], pair[1]
    size = size_of(audio, image)
    differences = (audio - image) / len(audio)
    expected = (
        (audio - image).square().sum(dim=2).mean(),
        2 * differences.mean(dim=1, keepdim=True),
        -2 * differences / image.shape[1],
    )
    for name in ("ot", "ot_att in epoch 1"):
        assert_same(value_and_gradients(make(name, audio, image), audio, image), expected, size**2, size)


@pytest.mark.parametrize("name", ALL)
@SETTINGS
@given(pair=pairs(coinciding=True), one_audio=st.booleans())
def test_few_tokens_and_coinciding_ones_give_finite_losses(name, pair, one_audio):
    audio, image = pair
    audio, image = (audio[:, :1], image) if one_audio else (audio, image[:, :1])
    for outcome in value_and_gradients(make(name, audio, image), audio, image):
        assert torch.isfinite(outcome).all()


@SETTINGS
@given(pairs())
def test_contrast_of_two_lone_tokens(pair):
    """Two pairs, cosines c_ij / 0.05: each of the four cross-entropies is log(1 + exp(c_wrong - c_right))."""
    assume(len(pair[0]) > 1)
    audio, image = (tokens[:2, :1] for tokens in pair)
    cosines = F.cosine_similarity(audio, image.transpose(0, 1), dim=2) / 0.05
    right, wrong = cosines.diagonal(), torch.stack((cosines[0, 1], cosines[1, 0]))
    others = torch.cat((wrong - right, wrong - right.flip(0)))
    expected = F.softplus(others).mean()
    torch.testing.assert_close(ContrastiveLoss()(audio, image).loss, expected, rtol=TOLERANCE, atol=TOLERANCE)
