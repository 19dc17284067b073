import math

import pytest
import torch

from dali_llava.modeling.sinkhorn import log_assignment, relative_eps, sinkhorn_log_plan, sinkhorn_potentials


def test_marginals_hold():
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(3, 7, 5, generator=generator, dtype=torch.float64)
    a = torch.rand(3, 7, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(3, 5, generator=generator, dtype=torch.float64) + 0.1
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    u, v = sinkhorn_potentials(cost, a, b, 0.1, 500)
    plan = sinkhorn_log_plan(cost, a, b, 0.1, u, v).exp()
    torch.testing.assert_close(plan.sum(2), a, rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.sum(1), b, rtol=0, atol=1e-15)


def test_two_by_two_has_a_closed_form():
    """With S = [[s, 0], [0, s]], by symmetry Q = [[p, q], [q, p]] with p / q = exp(s / eps)."""
    s, eps = 0.3, 0.1
    similarity = torch.tensor([[[s, 0.0], [0.0, s]]], dtype=torch.float64)
    p = 0.5 / (1 + math.exp(-s / eps))
    expected = torch.tensor([[[p, 0.5 - p], [0.5 - p, p]]], dtype=torch.float64)
    torch.testing.assert_close(log_assignment(similarity, eps=eps).exp(), expected, rtol=0, atol=1e-14)


def test_equals_matrix_scaling():
    """The iteration of Sinkhorn and Knopp on exp(S / eps), with plain products."""
    generator = torch.Generator().manual_seed(1)
    similarity = torch.rand(2, 6, 4, generator=generator, dtype=torch.float64)
    column = torch.ones(2, 4, dtype=torch.float64)
    kernel = (similarity / 0.1).exp()
    for _ in range(50):
        row = (1 / 6) / (kernel @ column[..., None])[..., 0]
        column = (1 / 4) / (row[:, None] @ kernel)[:, 0]
    expected = row[..., None] * kernel * column[:, None]
    torch.testing.assert_close(log_assignment(similarity).exp(), expected, rtol=1e-11, atol=0)


def test_no_plan_with_the_marginals_is_better():
    """Moving mass around a rectangle keeps the marginals; each such step must decrease <Q, S> + eps H(Q)."""
    generator = torch.Generator().manual_seed(2)
    similarity = torch.rand(1, 5, 5, generator=generator, dtype=torch.float64)
    plan = log_assignment(similarity, num_iterations=300).exp()

    def objective(q: torch.Tensor) -> float:
        return ((q * similarity).sum() - 0.1 * (q * q.log()).sum()).item()

    for i, j in [(1, 2), (3, 1), (4, 4)]:
        for step in (1e-6, -1e-6):
            moved = plan.clone()
            moved[0, 0, 0] += step
            moved[0, i, j] += step
            moved[0, i, 0] -= step
            moved[0, 0, j] -= step
            assert objective(moved) < objective(plan)


def test_weight_zero_is_as_good_as_removed():
    generator = torch.Generator().manual_seed(3)
    similarity = torch.rand(1, 6, 4, generator=generator, dtype=torch.float64)
    a = torch.tensor([[0.25, 0.25, 0.0, 0.25, 0.25, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, 0.0, 0.25, 0.25]], dtype=torch.float64)
    kept = log_assignment(similarity, a, b)
    rows, columns = a[0] > 0, b[0] > 0
    alone = log_assignment(similarity[:, rows][:, :, columns], a[:, rows], b[:, columns])
    torch.testing.assert_close(kept[:, rows][:, :, columns], alone, rtol=1e-12, atol=1e-12)
    assert (kept[:, ~rows] == -torch.inf).all() and (kept[:, :, ~columns] == -torch.inf).all()


def test_relative_eps_follows_the_cost():
    generator = torch.Generator().manual_seed(4)
    cost = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64)
    a = torch.full((2, 4), 0.25, dtype=torch.float64)
    b = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(relative_eps(cost, a, b, 0.1), 0.1 * cost.mean((1, 2)))
    plans = []
    for scale in (1.0, 2000.0):
        eps = relative_eps(scale * cost, a, b, 0.1)
        u, v = sinkhorn_potentials(scale * cost, a, b, eps, 20)
        plans.append(sinkhorn_log_plan(scale * cost, a, b, eps, u, v))
    torch.testing.assert_close(*plans, rtol=1e-10, atol=1e-10)


def test_half_precision_is_computed_in_float32_and_large_scores_stay_finite():
    similarity = torch.tensor([[[100.0, 0.0], [0.0, 100.0]]], dtype=torch.bfloat16)
    log_plan = log_assignment(similarity)
    assert log_plan.dtype == torch.float32
    torch.testing.assert_close(log_plan.exp(), torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]), rtol=0, atol=1e-4)


def test_no_gradient_runs_through():
    assert not log_assignment(torch.rand(1, 3, 3, requires_grad=True)).requires_grad


@pytest.mark.parametrize(("options", "message"), [({"eps": 0.0}, "eps"), ({"num_iterations": 0}, "num_iterations")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        log_assignment(torch.zeros(1, 2, 2), **options)
