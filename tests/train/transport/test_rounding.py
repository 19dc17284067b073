"""Far points: results stay accurate, and the gap includes the rounding error of the cost."""

from fractions import Fraction
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_llava.train.transport import solve_transport
from dali_llava.train.transport.costs import direct_costs, expanded_costs


FAR = 1e7
SOLVERS = ["exact", "certified", "sinkhorn", "partial", "unbalanced"]
proving = pytest.mark.parametrize("solver", ["exact", "certified"])


def clouds(seed, n=12, width=5, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, n, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def with_point(points, value):
    return torch.cat((points, points.new_full((len(points), 1, points.shape[2]), value)), dim=1)


def exact_costs(x, y):
    """Returns the squared distances (N, M) of the points (N, D) and (M, D) as fractions."""
    x, y = ([[Fraction(value) for value in row] for row in points.double().tolist()] for points in (x, y))
    return [[sum((p - q) ** 2 for p, q in zip(row, column, strict=True)) for column in y] for row in x]


def exact_optimum(x, y):
    """Returns the cost of the best permutation of N points with equal weights as a fraction."""
    cost = exact_costs(x, y)
    count = len(cost)
    return min(sum(cost[i][order[i]] for i in range(count)) for order in permutations(range(count))) / count


@proving
@pytest.mark.parametrize("n", [12, 150])
def test_a_far_point_on_both_sides_does_not_hide_the_others(solver, n):
    x, y = clouds(0, n)
    expected = solve_transport(x, y).cost * n / (n + 1)
    result = solve_transport(with_point(x, FAR), with_point(y, FAR), solver=solver)
    torch.testing.assert_close(result.cost, expected, rtol=1e-9, atol=0)
    assert (result.gap <= 1e-9 * expected).all()
    u, v = result.potentials
    lower = u.mean(dim=1) + v.mean(dim=1)
    torch.testing.assert_close(lower, expected, rtol=1e-9, atol=0)


@proving
def test_a_far_point_on_one_side_costs_its_share(solver):
    """All targets are at the origin, so that every plan costs the mean squared norm."""
    x, y = clouds(1)
    x = with_point(x, FAR)
    expected = x.square().sum(dim=2).mean(dim=1)
    for sources, targets in ((x, torch.zeros_like(y)), (torch.zeros_like(y), x)):
        result = solve_transport(sources, targets, solver=solver)
        torch.testing.assert_close(result.cost, expected, rtol=1e-12, atol=0)
        assert ((result.cost - expected).abs() <= result.gap + 1e-14 * expected).all()


@proving
def test_two_far_clusters_are_matched_each_within_itself(solver):
    x, y = clouds(2)
    offset = torch.full((5,), 3e6, dtype=torch.float64)
    expected = (solve_transport(x, y).cost + solve_transport(y, x + 1).cost) / 2
    far_x, far_y = torch.cat((x - offset, y + offset), dim=1), torch.cat((y - offset, x + 1 + offset), dim=1)
    result = solve_transport(far_x, far_y, solver=solver)
    torch.testing.assert_close(result.cost, expected, rtol=1e-7, atol=0)  # the shift rounds the points: 3e6 * 1e-16
    assert (result.gap <= 1e-7 * expected).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_far_point_in_one_sample_leaves_the_other_samples_alone(solver):
    x, y = clouds(3, batch=3)
    far_x, far_y = x.clone(), y.clone()
    far_x[1, 4], far_y[1, 7] = FAR, FAR
    near, far = solve_transport(x, y, solver=solver), solve_transport(far_x, far_y, solver=solver)
    for sample in (0, 2):
        assert torch.equal(near.cost[sample], far.cost[sample]) and torch.equal(near.gap[sample], far.gap[sample])
        assert torch.equal(near.plan.to_dense()[sample], far.plan.to_dense()[sample])
        assert all(
            torch.equal(*(p[sample] for p in pair)) for pair in zip(near.potentials, far.potentials, strict=True)
        )
    assert far.plan.is_coalesced()
    optimum = solve_transport(far_x[1:2], far_y[1:2]).cost
    if solver in ("exact", "certified"):
        assert torch.equal(far.plan.to_dense()[1], solve_transport(far_x[1:2], far_y[1:2]).plan.to_dense()[0])
        torch.testing.assert_close(far.cost[1:2], optimum, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_common_shift_changes_nothing_but_the_digits_it_takes(solver):
    x, y = (points.mul(2**10).round().div(2**10) for points in clouds(4))  # exact after the shift
    plain, shifted = solve_transport(x, y, solver=solver), solve_transport(x + 2.0**40, y + 2.0**40, solver=solver)
    torch.testing.assert_close(shifted.cost, plain.cost, rtol=1e-5 if solver == "sinkhorn" else 1e-9, atol=0)


@proving
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_narrow_types_and_units(solver, dtype, scale):
    x, y = ((scale * points).to(dtype) for points in clouds(5, n=6, batch=1))
    x, y = with_point(x, FAR * scale), with_point(y, FAR * scale)
    result = solve_transport(x, y, solver=solver)
    assert result.cost.dtype == torch.float32
    assert result.cost.item() == pytest.approx(float(exact_optimum(x[0], y[0])), rel=1e-6)
    assert result.gap.item() <= 1e-9 * result.cost.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_beside_a_far_point(dtype):
    x, y = clouds(6, dtype=dtype)
    far_x, far_y = with_point(x, FAR), with_point(y, FAR)
    gradients = []
    for points, targets in ((x, y), (far_x, far_y)):
        points, targets = points.clone().requires_grad_(), targets.clone().requires_grad_()
        cost = solve_transport(points, targets).cost * points.shape[1]
        gradients.append(torch.autograd.grad(cost.sum(), (points, targets)))
    for near, far in zip(*gradients, strict=True):
        torch.testing.assert_close(far[:, :-1], near, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-7)
        torch.testing.assert_close(far[:, -1], torch.zeros_like(far[:, -1]), rtol=0, atol=1e-6)


def test_a_far_point_of_weight_zero_does_not_count():
    x, y = clouds(7)
    expected = solve_transport(x, y)
    weights = with_point(torch.ones(2, 12, 1, dtype=torch.float64), 0.0)[..., 0]
    result = solve_transport(with_point(x, FAR), with_point(y, -FAR), weights, weights)
    torch.testing.assert_close(result.cost, expected.cost, rtol=1e-10, atol=0)
    # The potential is the cost of the first mass that the point receives.
    u, v = result.potentials
    first = (with_point(x, FAR)[:, -1:] - y).square().sum(dim=2) - v[:, :-1]
    torch.testing.assert_close(u[:, -1], first.min(dim=1).values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", ["partial", "unbalanced"])
def test_gap_of_relaxed_transport_covers_the_error_beside_a_far_point(solver):
    """The share is nearly 1, and the penalty is strong enough to move nearly all mass."""
    x, y = clouds(8, n=5, batch=1)
    far_x, far_y = with_point(x, FAR), with_point(y, FAR)
    options = {"mass": 1 - 1e-9} if solver == "partial" else {"relaxation": 1e9, "relative": False}
    result = solve_transport(far_x, far_y, solver=solver, **options)
    truth = float(exact_optimum(far_x[0], far_y[0]))
    assert abs(result.cost.item() - truth) <= result.gap.item() + 1e-6 * truth


@pytest.mark.parametrize("kind", ["near", "far", "shifted"])
def test_error_bounds_of_costs_hold_and_are_not_vacuous(kind):
    x, y = (points[0] for points in clouds(9, n=8, width=33))
    if kind == "far":
        x[0], y[3], y[4] = FAR, FAR, -FAR
    elif kind == "shifted":
        x, y = x + FAR, y + FAR
    truth = exact_costs(x, y)
    for costs in (expanded_costs(x[None], y[None]), direct_costs(x[None], y[None])):
        for i in range(8):
            for j in range(8):
                value = costs.values[0, i, j].item()
                error = abs(float(Fraction(value) - truth[i][j]))
                bound = costs.row_error[0, i] + costs.column_error[0, j] + costs.relative_error * value
                assert error <= bound.item()
                if kind != "far":
                    assert bound.item() <= 1e-12 * value


@st.composite
def problems(draw):
    """x and y (1, N, D): near points, points far away in one or both sets, a shift and a scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    sets = []
    far = 10.0 ** draw(st.integers(0, 9))
    for _ in range(2):
        points = torch.randn(1, count, width, generator=generator, dtype=torch.float64)
        for _ in range(draw(st.integers(0, 2))):
            points[0, draw(st.integers(0, count - 1))] += far * draw(st.sampled_from([-1.0, 1.0]))
        sets.append(points)
    shift, unit = draw(st.sampled_from([0.0, 1.0, 1e6])), draw(st.sampled_from([1e-4, 1.0, 1e4]))
    return tuple((unit * (points + shift)).to(dtype) for points in sets)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(["exact", "certified", "sinkhorn"]))
def test_gap_covers_the_error(problem, solver):
    x, y = problem
    truth = exact_optimum(x[0], y[0])
    # The precision of the returned cost: that of float64, which a gap of 0 does not include, or of float32.
    digits = 1e-12 if x.dtype == torch.float64 else 1e-7
    result = solve_transport(x, y, solver=solver)
    error = abs(Fraction(result.cost.item()) - truth)
    assert error <= Fraction(result.gap.item()) + Fraction(digits) * truth
    if solver != "sinkhorn":
        assert error <= Fraction(1e-9 if x.dtype == torch.float64 else 1e-6) * truth
    lower = Fraction(result.potentials[0].mean().item()) + Fraction(result.potentials[1].mean().item())
    assert lower <= truth + Fraction(result.gap.item()) + Fraction(digits) * truth
