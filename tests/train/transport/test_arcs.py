import pytest
import torch

from dali_llava.train.transport import exact
from dali_llava.train.transport.arcs import _below_quantile, _north_west, _potentials, likely_arcs
from dali_llava.train.transport.solve import SOLVERS


def problem(batch=3, n=150, m=140, seed=0):
    """Costs in [0, 1] between random points of the plane, and uneven weights, some of them 0; float64."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(batch, count, 2, generator=generator, dtype=torch.float64) for count in (n, m))
    a, b = (torch.rand(batch, count, generator=generator, dtype=torch.float64) for count in (n, m))
    a[:, 3], b[:, 5] = 0, 0
    cost = (x[:, :, None] - y[:, None]).square().sum(-1) / 2
    return cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def test_holds_the_optimal_plan_and_little_else():
    cost, a, b = problem()
    kept, plan = likely_arcs(cost, a, b), exact.solve_exact(cost, a, b).plan.to_dense()
    on_the_plan = plan > 0
    assert (kept & on_the_plan).sum() >= 0.99 * on_the_plan.sum()
    assert kept.sum(dim=(1, 2)).max() <= 1.1 * 12 * 290 + 290
    assert not kept[:, 3].any() and not kept[..., 5].any()


def test_potentials_are_feasible_and_near_the_optimum():
    cost, a, b = (tensor.float() for tensor in problem(seed=1))
    u, v = _potentials(cost, a, b, (0.03, 0.01, 0.003), (20, 20, 100))
    counted = (a > 0)[..., None] & (b > 0)[:, None]
    assert (cost - u[..., None] - v[:, None])[counted].min() >= -1e-6
    bound = (a * u).sum(1) + (b * v).sum(1)
    optimum = exact.solve_exact(cost.double(), a.double(), b.double()).cost.float()
    assert (bound <= optimum + 1e-6).all() and (bound >= 0.95 * optimum).all()


def test_north_west_corner_on_paper():
    """Row 0 fills column 0 and part of column 1, row 1 the rest of it, and row 2 column 2; 1 and 2 meet at 0.75."""
    a, b = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.5, 0.25]]).double()
    expected = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 1, 1]]).bool()
    assert torch.equal(_north_west(a, b)[0], expected)


def test_smallest_of_few_is_exact_and_of_many_about_right():
    generator = torch.Generator().manual_seed(2)
    few, many = torch.rand(2, 20, 30, generator=generator), torch.rand(2, 400, 512, generator=generator)
    assert _below_quantile(few, 50).sum(dim=(1, 2)).tolist() == [50, 50]
    assert few[_below_quantile(few, 50)].max() < few[~_below_quantile(few, 50)].min() + 0.05
    counts = _below_quantile(many, 10_000).sum(dim=(1, 2))
    assert ((counts - 10_000).abs() < 1_000).all()


def test_parts_of_a_batch_do_not_see_each_other():
    cost, a, b = problem(batch=60, n=130, m=140, seed=3)
    whole = likely_arcs(cost, a, b)
    assert torch.equal(whole[50:], likely_arcs(cost[50:], a[50:], b[50:]))


@pytest.fixture
def sparse_calls(monkeypatch):
    """The number of arcs in each run of the sparse simplex."""
    calls = []

    def spy(arcs, *others):
        calls.append(len(arcs[0]))
        return sparse_simplex(arcs, *others)

    sparse_simplex = exact.sparse_simplex
    monkeypatch.setattr(exact, "sparse_simplex", spy)
    return calls


def test_exact_on_some_arcs_is_exact_on_all(sparse_calls, monkeypatch):
    cost, a, b = problem(seed=4)
    some = exact.solve_exact(cost, a, b)
    assert 3 <= len(sparse_calls) <= 9
    monkeypatch.setattr(exact, "_LARGE", 1000)
    whole = exact.solve_exact(cost, a, b)
    torch.testing.assert_close(some.cost, whole.cost, rtol=1e-12, atol=0)
    torch.testing.assert_close(some.plan.to_dense(), whole.plan.to_dense(), rtol=0, atol=1e-13)
    assert some.gap.tolist() == [0, 0, 0]
    assert (some.u[..., None] + some.v[:, None] - cost).masked_fill(
        (a == 0)[..., None] & (b == 0)[:, None], 0
    ).max() < 1e-12


def test_exact_adds_the_arcs_that_a_poor_guess_lacks(sparse_calls, monkeypatch):
    cost, a, b = problem(batch=1, seed=5)
    expected = exact.solve_exact(cost, a, b).cost
    sparse_calls.clear()
    monkeypatch.setattr(exact, "likely_arcs", lambda cost, a, b: _north_west(a, b))
    monkeypatch.setattr(exact, "_ROUNDS", 50)
    result = exact.solve_exact(cost, a, b)
    assert 2 < len(sparse_calls) < 50 and sparse_calls == sorted(sparse_calls)
    torch.testing.assert_close(result.cost, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("guess", ["no plan", "too few rounds"])
def test_exact_falls_back_on_all_arcs(guess, sparse_calls, monkeypatch):
    cost, a, b = problem(batch=2, seed=6)
    expected = exact.solve_exact(cost, a, b)
    sparse_calls.clear()
    monkeypatch.setattr(exact, "_ROUNDS", 1)
    arcs = torch.zeros_like(cost, dtype=torch.bool)
    arcs[:, :, 0] = True
    if guess == "too few rounds":
        arcs = _north_west(a, b)
    monkeypatch.setattr(exact, "likely_arcs", lambda *_: arcs)
    if guess == "no plan":
        with pytest.warns(UserWarning):
            result = exact.solve_exact(cost, a, b, num_threads=1)
    else:
        result = exact.solve_exact(cost, a, b, num_threads=1)
    assert len(sparse_calls) == 2
    torch.testing.assert_close(result.cost, expected.cost, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", ["exact", "certified"])
def test_costs_that_are_all_one(solver):
    """Every plan is optimal, and all arcs have the same cost."""
    cost = torch.full((2, 130, 140), 0.7, dtype=torch.float64)
    a, b = (torch.full((2, count), 1 / count, dtype=torch.float64) for count in (130, 140))
    result = SOLVERS[solver](cost, a, b)
    torch.testing.assert_close(result.cost, torch.full((2,), 0.7, dtype=torch.float64))
    assert result.gap.max() < 1e-12
