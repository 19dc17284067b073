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


def naive_loss(audio, image, scale, reference=False):
    """Equation 4, or the authors' code, one token at a time."""
    total = 0
    for x, y in zip(audio, image, strict=True):
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        s = x @ y.T
        q = assignment(s.detach())
        for q_m, s_m in ((q, s), (q.T, s.T)):
            if reference:
                q_m = q_m.log()
            for i in range(len(q_m)):
                if reference:
                    logits = scale * torch.stack([q_j @ s_m[i] for q_j in q_m])
                else:
                    logits = scale * torch.stack([q_m[i] @ s_j for s_j in s_m])
                total = total - (logits[i] - logits.exp().sum().log()) / len(q_m)
    return total / len(audio)


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_definition(variant, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    audio, image = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (5, 4))
    loss = TokenAssignmentLoss(variant).to(dtype)
    narrow = [batch.to(dtype).requires_grad_() for batch in (audio, image)]
    output = loss(*narrow)
    gradients = torch.autograd.grad(output.loss, (*narrow, loss.log_scale))

    wide = [batch.detach().double().requires_grad_() for batch in narrow]
    log_scale = loss.log_scale.detach().double().requires_grad_()
    scale = (log_scale.exp() if variant == "paper" else log_scale)[0]
    expected = naive_loss(*wide, scale, variant == "reference")
    torch.testing.assert_close(output.loss.double(), expected, rtol=tolerance, atol=0)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, (*wide, log_scale)), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    start = 1 / 0.07 if variant == "paper" else math.log(1 / 0.07)
    assert output.logs["scale"] == pytest.approx(start, rel=1e-6)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_float32_gradient_at_full_size(variant):
    """512 audio and 576 image tokens; the softmax of "reference" is nearly one-hot."""
    generator = torch.Generator().manual_seed(0)
    audio, image = (torch.randn(1, n, 1024, generator=generator, dtype=torch.float64) for n in (512, 576))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        tokens = audio.to(dtype, copy=True).requires_grad_()
        TokenAssignmentLoss(variant).to(dtype)(tokens, image.to(dtype)).loss.backward()
        gradients.append(tokens.grad.double())
    single, double = gradients
    assert double.norm() > 1e-7 and (single - double).norm() < 1e-4 * double.norm()


def test_length_of_tokens_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    audio, image = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (5, 4))
    loss = TokenAssignmentLoss()
    torch.testing.assert_close(loss(3 * audio, 0.1 * image).loss, loss(audio, image).loss)


def test_indistinct_tokens_give_the_logarithm_of_their_number():
    audio, image = torch.ones(1, 5, 3), torch.ones(1, 4, 3)
    assert TokenAssignmentLoss()(audio, image).loss.item() == pytest.approx(math.log(5) + math.log(4), rel=1e-6)


@pytest.mark.parametrize(("start", "held"), [(10.0, 100.0), (-3.0, 1.0)])
def test_scale_is_held_and_can_come_back(start, held):
    generator = torch.Generator().manual_seed(2)
    audio, image = (torch.randn(1, n, 6, generator=generator) for n in (5, 4))
    loss = TokenAssignmentLoss()
    torch.nn.init.constant_(loss.log_scale, start)
    output = loss(audio, image)
    output.loss.backward()
    assert output.logs["scale"] == pytest.approx(held, rel=1e-5)
    assert loss.log_scale.grad != 0


@pytest.mark.parametrize("options", [{"variant": "exp"}, {"eps": 0.0}, {"num_iterations": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenAssignmentLoss(**options)
