"""Properties of transport for any points and weights, down to one point and one sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_llava.train.transport import solve_transport


SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
solvers = st.sampled_from(["exact", "certified"])
sizes = st.integers(1, 9)


@st.composite
def problems(draw, sets: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`sets` pairs of points (B, N, D) and weights (B, N), float64; some weights are 0, some points coincide."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, width, scale = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1e-3, 1.0, 1e3]))
    found = []
    for _ in range(sets):
        count = draw(sizes)
        points = scale * torch.randn(batch, count, width, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):
            points = scale * (points / scale).round()
        weights = torch.rand(batch, count, generator=generator, dtype=torch.float64)
        if count > 1 and draw(st.booleans()):
            weights[:, 0] = 0.0
        found.append((points, weights / weights.sum(dim=1, keepdim=True)))
    return found


def scale_of(*sets: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Returns the largest squared norm, to which the rounding error of a cost in float64 is proportional."""
    return max(points.square().sum(dim=2).max().item() for points, _ in sets) + 1e-300


@SETTINGS
@given(problems(), solvers)
def test_plan_has_the_marginals_and_no_gap(problem, solver):
    (x, a), (y, b) = problem
    result = solve_transport(x, y, a, b, solver=solver)
    plan = result.plan.to_dense()
    assert plan.min() >= 0
    torch.testing.assert_close(plan.sum(dim=2), a, rtol=0, atol=1e-9)
    torch.testing.assert_close(plan.sum(dim=1), b, rtol=0, atol=1e-9)
    assert result.gap.min() >= -1e-12 * scale_of(*problem) and result.gap.max() <= 1e-9 * scale_of(*problem)
    assert (plan > 0).sum(dim=(1, 2)).max() <= x.shape[1] + y.shape[1] - 1


@SETTINGS
@given(problems(), solvers)
def test_cost_is_symmetric(problem, solver):
    (x, a), (y, b) = problem
    there, back = solve_transport(x, y, a, b, solver=solver).cost, solve_transport(y, x, b, a, solver=solver).cost
    torch.testing.assert_close(there, back, rtol=0, atol=1e-9 * scale_of(*problem))


@SETTINGS
@given(problems(), solvers, st.integers(0, 2**31))
def test_order_does_not_matter_and_a_common_shift_neither(problem, solver, seed):
    (x, a), (y, b) = problem
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(x.shape[1], generator=generator)
    shift = scale_of(*problem) ** 0.5 * torch.randn(x.shape[2], generator=generator, dtype=torch.float64)
    cost = solve_transport(x, y, a, b, solver=solver).cost
    moved = solve_transport(x[:, order] + shift, y + shift, a[:, order], b, solver=solver).cost
    torch.testing.assert_close(moved, cost, rtol=0, atol=1e-9 * scale_of(*problem))


@SETTINGS
@given(problems(sets=3))
def test_root_obeys_the_triangle_inequality(problem):
    (x, a), (y, b), (z, c) = problem

    def distance(first, second):
        return solve_transport(first[0], second[0], first[1], second[1]).cost.clamp(min=0).sqrt()

    detour = distance((x, a), (y, b)) + distance((y, b), (z, c))
    # the root turns a rounding error of 1e-16 of the cost into 1e-8
    assert (distance((x, a), (z, c)) <= detour + 1e-7 * scale_of(*problem) ** 0.5).all()


@SETTINGS
@given(problems(), solvers)
def test_costs_lie_between_the_centres_distance_and_the_independent_plans(problem, solver):
    (x, a), (y, b) = problem
    cost = solve_transport(x, y, a, b, solver=solver).cost
    centres = ((a[:, None] @ x) - (b[:, None] @ y)).square().sum(dim=(1, 2))
    independent = torch.einsum("bi,bj,bij->b", a, b, torch.cdist(x, y).square())
    slack = 1e-9 * scale_of(*problem)
    assert (centres <= cost + slack).all() and (cost <= independent + slack).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@SETTINGS
@given(problem=problems())
def test_half_precision_points_cost_what_their_values_cost(problem, dtype):
    (x, a), (y, b) = problem
    x, y = (torch.nn.functional.normalize(points, dim=2).to(dtype) for points in (x, y))
    cost = solve_transport(x, y, a, b).cost
    assert cost.dtype == torch.float32
    wide = solve_transport(x.double(), y.double(), a, b).cost
    torch.testing.assert_close(cost.double(), wide, rtol=1e-5, atol=1e-6)
