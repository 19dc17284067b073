import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dali_llava.train.losses import TransportLoss
from dali_llava.train.losses.transport import pair_distances


def squared_distances(x, y):
    return (x[:, :, None] - y[:, None]).square().sum(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_an_assignment(dtype, tolerance):
    """For equal numbers of tokens, uniform transport is an assignment, and its gradient is that of the pairs."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(3, 20, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    image = torch.randn(3, 20, 8, generator=generator, dtype=torch.float64).to(dtype)
    output = TransportLoss()(audio, image)
    (gradient,) = torch.autograd.grad(output.loss, audio)

    wide = audio.detach().double().requires_grad_()
    costs = squared_distances(wide, image.double())
    pairings = [linear_sum_assignment(cost.detach().numpy())[1] for cost in costs]
    expected = torch.stack([cost[range(20), pairing].mean() for cost, pairing in zip(costs, pairings, strict=True)])
    (expected_gradient,) = torch.autograd.grad(expected.mean(), wide)
    torch.testing.assert_close(output.loss.double(), expected.mean(), rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance * 1e-1)
    assert output.logs.pop("transport_seconds") > 0
    assert output.logs == pytest.approx(
        {"transport_cost": output.loss.item(), "mean_distance": costs.mean().item(), "max_gap": 0.0}, rel=1e-5
    )


def test_sinkhorn_lies_above_by_no_more_than_its_gap():
    generator = torch.Generator().manual_seed(1)
    audio, image = (torch.randn(2, n, 8, generator=generator, dtype=torch.float64) for n in (12, 9))
    exact = TransportLoss()(audio, image).loss.item()
    rough = TransportLoss("sinkhorn", {"eps": (0.1,), "num_iterations": (20,)})(audio, image)
    assert 0 < rough.loss.item() - exact <= rough.logs["max_gap"]


def test_pair_distances():
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(2, n, 4, generator=generator, dtype=torch.float64) + 50 for n in (6, 5))
    a, b = (torch.rand(2, n, generator=generator, dtype=torch.float64) for n in (6, 5))
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    expected = torch.einsum("bi,bij,bj->b", a, squared_distances(x, y), b)
    torch.testing.assert_close(pair_distances(x, y, a, b), expected, rtol=1e-12, atol=0)


def test_unknown_solver_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown solver 'simplex'"):
        TransportLoss(solver="simplex")
