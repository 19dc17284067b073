import math

import pytest
import torch

from dali_llava.train.losses import TokenAssignmentLoss


def assignment(similarity, eps=0.1, iterations=50):
    """Sinkhorn and Knopp's scaling of exp(S / eps) to uniform marginals."""
    n, m = similarity.shape
    kernel, column = (similarity / eps).exp(), torch.ones(m, dtype=similarity.dtype)
    for _ in range(iterations):
        row = 1 / (n * (kernel @ column))
        column = 1 / (m * (row @ kernel))
    return row[:, None] * kernel * column


def naive_loss(audio, image, scale, reference=False, rescale=False):
    """Equation 4, or the authors' code, one token at a time, in the precision of the tokens."""
    total = 0
    for x, y in zip(audio, image, strict=True):
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        s = x @ y.T
        q = assignment(s.detach())
        for q_m, s_m in ((q, s), (q.T, s.T)):
            if reference:
                q_m = q_m.log()
            if rescale:
                q_m = len(q_m) * q_m
            for i in range(len(q_m)):
                if reference:
                    logits = scale * torch.stack([q_j @ s_m[i] for q_j in q_m])
                else:
                    logits = scale * torch.stack([q_m[i] @ s_j for s_j in s_m])
                total = total - (logits[i] - logits.exp().sum().log()) / len(q_m)
    return total / len(audio)


@pytest.mark.parametrize(
    ("variant", "rescale"), [("paper", False), ("paper", True), ("reference", False)], ids=["paper", "rescale", "ref"]
)
@pytest.mark.parametrize("size", [(2, 5, 4), (1, 5, 4), (2, 5, 1)], ids=["batch", "single", "one frame"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_definition(variant, rescale, size, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    batch, *tokens = size
    audio, image = (torch.randn(batch, n, 6, generator=generator, dtype=torch.float64) for n in tokens)
    loss = TokenAssignmentLoss(variant, rescale).to(dtype)
    narrow = [batch.to(dtype).requires_grad_() for batch in (audio, image)]
    output = loss(*narrow)
    gradients = torch.autograd.grad(output.loss, (*narrow, loss.log_scale))

    wide = [batch.detach().double().requires_grad_() for batch in narrow]
    log_scale = loss.log_scale.detach().double().requires_grad_()
    scale = (log_scale.exp() if variant == "paper" else log_scale)[0]
    expected = naive_loss(*wide, scale, variant == "reference", rescale)
    torch.testing.assert_close(output.loss.double(), expected, rtol=tolerance, atol=0)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, (*wide, log_scale)), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    start = 1 / 0.07 if variant == "paper" else math.log(1 / 0.07)
    assert output.logs["scale"] == pytest.approx(start, rel=1e-6)


@pytest.mark.parametrize(("variant", "rescale"), [("paper", False), ("paper", True), ("reference", False)])
def test_float32_gradient_at_full_size(variant, rescale):
    """512 audio and 576 image tokens; the softmax of "reference" is nearly one-hot."""
    generator = torch.Generator().manual_seed(0)
    audio, image = (torch.randn(1, n, 768, generator=generator, dtype=torch.float64) for n in (512, 576))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        tokens = audio.to(dtype, copy=True).requires_grad_()
        TokenAssignmentLoss(variant, rescale).to(dtype)(tokens, image.to(dtype)).loss.backward()
        gradients.append(tokens.grad.double())
    single, double = gradients
    assert double.norm() > 1e-7 and (single - double).norm() < 1e-4 * double.norm()


@pytest.mark.parametrize(("variant", "rescale"), [("paper", False), ("paper", True), ("reference", False)])
def test_masked_tokens_count_as_removed(variant, rescale):
    generator = torch.Generator().manual_seed(3)
    audio, image = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (5, 4))
    audio_mask, image_mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    audio_mask[0, [0, 3]] = image_mask[1, 1:] = False
    loss = TokenAssignmentLoss(variant, rescale).double()
    audio.requires_grad_()
    masked = loss(audio, image, audio_mask, image_mask).loss
    removed = [
        loss(*(each[row][mask[row]][None] for each, mask in ((audio, audio_mask), (image, image_mask)))).loss
        for row in range(2)
    ]
    removed = sum(removed) / 2
    torch.testing.assert_close(masked, removed, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(each, audio)[0] for each in (masked, removed)), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("options", "scale", "expected"),
    [
        ({}, 1 / 0.07, 7.88),
        ({}, 100, 5.32),
        ({"rescale": True}, 1 / 0.07, 2 * math.log1p(63 * math.exp(-1 / 0.07))),
        ({"variant": "reference"}, 1 / 0.07, 0.0),
    ],
)
def test_perfectly_matched_tokens(options, scale, expected):
    """64 orthogonal tokens of each modality, in pairs; equal tokens have a loss of 8.32."""
    tokens = torch.eye(64, dtype=torch.float64)[None]
    loss = TokenAssignmentLoss(**options).double()
    torch.nn.init.constant_(loss.log_scale, math.log(scale))
    assert loss(tokens, tokens).loss.item() == pytest.approx(expected, abs=5e-3, rel=1e-4)
    assert loss(torch.ones_like(tokens), torch.ones_like(tokens)).loss.item() == pytest.approx(8.32, abs=5e-3)


def test_length_of_tokens_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    audio, image = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (5, 4))
    loss = TokenAssignmentLoss()
    torch.testing.assert_close(loss(3 * audio, 0.1 * image).loss, loss(audio, image).loss)


def test_indistinct_tokens_give_the_logarithm_of_their_number():
    audio, image = torch.ones(1, 5, 3), torch.ones(1, 4, 3)
    assert TokenAssignmentLoss()(audio, image).loss.item() == pytest.approx(math.log(5) + math.log(4), rel=1e-6)


@pytest.mark.parametrize(("start", "held", "inward"), [(10.0, 100.0, 1.0), (-3.0, 1.0, -1.0)])
def test_scale_is_held_and_can_come_back(start, held, inward):
    """The gradient of a scale outside of its range leads into the range, or is 0."""
    generator = torch.Generator().manual_seed(2)
    audio, image = (torch.randn(1, n, 6, generator=generator) for n in (5, 4))
    loss = TokenAssignmentLoss()
    torch.nn.init.constant_(loss.log_scale, start)
    output = loss(audio, image)
    assert output.logs["scale"] == pytest.approx(held, rel=1e-5)
    slopes = [torch.autograd.grad(sign * output.loss, loss.log_scale, retain_graph=True)[0].item() for sign in (1, -1)]
    assert sorted(inward * slope for slope in slopes)[0] == 0 < max(inward * slope for slope in slopes)
    assert loss.log_scale.item() == start  # an engine may train a copy, which a change here would not reach


@pytest.mark.parametrize(
    "options", [{"variant": "exp"}, {"rescale": True, "variant": "reference"}, {"eps": 0.0}, {"num_iterations": 0}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenAssignmentLoss(**options)
