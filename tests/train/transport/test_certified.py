import numpy as np
import ot
import pytest
import torch

from dali_llava.train.transport import certified, check_solver, solve, solve_transport


FAMILIES = ["uniform", "softmax_1", "softmax_3", "low_rank", "duplicates"]
SIZES = [(3, 40, 50, 8), (3, 200, 230, 32)]


def problem(family, size=SIZES[0], seed=0):
    """Points x, y and weights a, b, in float64."""
    batch, n, m, width = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y = normal(batch, n, width), normal(batch, m, width) + 0.3
    a, b = (torch.full((batch, count), 1 / count, dtype=torch.float64) for count in (n, m))
    if family.startswith("softmax"):
        std = float(family[-1])
        a, b = (std * normal(batch, n)).softmax(1), (std * normal(batch, m)).softmax(1)
    elif family == "low_rank":
        basis = normal(batch, 3, width)
        x, y = normal(batch, n, 3) @ basis, (normal(batch, m, 3) + 0.3) @ basis
    elif family == "duplicates":
        x = x[:, torch.randint(n // 3, (n,), generator=generator)]
        y = torch.cat((y[:, : m // 2], x[:, : m - m // 2]), dim=1)
    return x, y, a, b


def squared_distances(x, y):
    return (x[:, :, None] - y[:, None]).square().sum(-1)


@pytest.fixture
def dense_samples(monkeypatch):
    """The samples solved by the dense solver, one list per call."""
    calls = []

    def spy(*arguments, **options):
        calls.append(options["sample_names"])
        return solve.solve_exact(*arguments, **options)

    monkeypatch.setattr(certified, "solve_exact", spy)
    return calls


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_finds_and_proves_the_optimum(family, size, dense_samples):
    x, y, a, b = problem(family, size)
    result, exact = solve_transport(x, y, a, b, solver="certified"), solve_transport(x, y, a, b)
    assert dense_samples == []
    torch.testing.assert_close(result.cost, exact.cost, rtol=1e-9, atol=0)
    assert (result.gap >= 0).all() and (result.gap <= 1e-9 * result.cost).all()

    # Repeats the proof with the returned values.
    cost = squared_distances(x, y)
    u, v = result.potentials
    assert (u[..., None] + v[:, None] <= cost + 1e-12 * cost.amax()).all()
    lower = (a * u).sum(1) + (b * v).sum(1)
    assert (lower >= (1 - 1e-9) * result.cost).all()
    plan = result.plan.to_dense()
    assert (plan >= 0).all() and (result.plan.values() > 0).all()
    torch.testing.assert_close(plan.sum(2), a, rtol=0, atol=1e-13)
    torch.testing.assert_close(plan.sum(1), b, rtol=0, atol=1e-13)
    torch.testing.assert_close((plan * cost).sum((1, 2)), result.cost, rtol=1e-11, atol=0)
    assert torch.bincount(result.plan.indices()[0]).max() < x.shape[1] + y.shape[1]


# With duplicated points the optimal plan is not unique, and with equal partial sums of the weights the potentials
# are not unique, so that the gradient is not unique either.
@pytest.mark.parametrize(("family", "of_weights"), [("uniform", False), ("softmax_1", True), ("softmax_3", True)])
def test_gradients_are_the_exact_solvers(family, of_weights):
    x, y, a, b = problem(family, seed=1)
    wanted = [x, y, a, b] if of_weights else [x, y]
    for tensor in wanted:
        tensor.requires_grad_()
    scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    got, expected = (
        torch.autograd.grad((scale * solve_transport(x, y, a, b, solver=solver).cost).sum(), wanted)
        for solver in ("certified", "exact")
    )
    for gradient, reference in zip(got, expected, strict=True):
        assert (gradient - reference).abs().max() <= 1e-6 * reference.abs().max()


def test_a_poor_proposal_is_mended_by_adding_arcs(dense_samples, monkeypatch):
    x, y, a, b = problem("softmax_1", seed=2)
    kept = []

    def spy(cost, a, b, arcs, *others):
        kept.append(arcs.sum().item() / len(arcs))
        return solve_restricted(cost, a, b, arcs, *others)

    solve_restricted = certified._solve_restricted
    monkeypatch.setattr(certified, "_solve_restricted", spy)
    poor = {"eps": (10.0,), "num_iterations": (1,), "arcs_per_point": 1, "rounds": 50}
    result = solve_transport(x, y, a, b, solver="certified", **poor)
    assert dense_samples == [] and 2 <= len(kept) <= 50
    # It started with the arcs of the north-west corner and at most one per point.
    assert kept[0] < 2 * (40 + 50) and kept[1] > kept[0]
    torch.testing.assert_close(result.cost, solve_transport(x, y, a, b).cost, rtol=1e-9, atol=0)
    assert (result.gap <= 1e-9 * result.cost).all()


def test_what_no_round_proves_goes_to_the_dense_solver(dense_samples):
    x, y, a, b = problem("softmax_1", seed=3)
    exact = solve_transport(x, y, a, b)
    for options in ({"rounds": 0}, {"eps": (10.0,), "num_iterations": (1,), "arcs_per_point": 1, "rounds": 1}):
        result = solve_transport(x, y, a, b, solver="certified", **options)
        assert torch.equal(result.cost, exact.cost) and result.gap.tolist() == [0, 0, 0]
        assert torch.equal(result.plan.to_dense(), exact.plan.to_dense())
        assert all(map(torch.equal, result.potentials, exact.potentials))
    assert dense_samples == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("wrong", ["failure", "cost"])
def test_one_problem_that_fails_goes_to_the_dense_solver_alone(wrong, dense_samples, monkeypatch):
    """The simplex fails, or returns a cost below the lower bound."""
    x, y, a, b = problem("softmax_1", seed=4)
    solve_restricted = certified._solve_restricted

    def spoil(*arguments):
        solved = solve_restricted(*arguments)
        if wrong == "failure":
            solved[1][0][0] = 1
        else:
            solved[1][0][1] *= 0.5
        return solved

    monkeypatch.setattr(certified, "_solve_restricted", spoil)
    result, exact = solve_transport(x, y, a, b, solver="certified"), solve_transport(x, y, a, b)
    assert dense_samples == [[1]]
    torch.testing.assert_close(result.cost, exact.cost, rtol=1e-9, atol=0)
    torch.testing.assert_close(result.plan.to_dense(), exact.plan.to_dense(), rtol=0, atol=1e-13)
    assert result.plan.is_coalesced() and torch.equal(result.plan.indices(), exact.plan.indices())


def test_a_simplex_that_finds_no_plan_is_a_failure():
    """Both rows can only be moved to the first column, for which POT returns a plan of cost 0."""
    with pytest.warns(UserWarning):
        numbers, _ = certified._solve_one(*np.full((2, 2), 0.5), np.array([0, 1]), np.array([0, 0]), np.ones(2), 1000)
    assert numbers.tolist() == [1, 0, 0, 0, 0, 0]


def test_a_plan_that_leaves_mass_behind_is_a_failure(monkeypatch):
    """Even if the simplex reports no problem."""
    emd = ot.emd

    def lose_mass(*arguments, **options):
        plan, log = emd(*arguments, **options)
        return 0.9 * plan, log

    arguments = (*np.full((2, 2), 0.5), np.array([0, 1]), np.array([0, 1]), np.ones(2), 1000)
    assert certified._solve_one(*arguments)[0][:2].tolist() == [0, 1]
    monkeypatch.setattr(ot, "emd", lose_mass)
    assert certified._solve_one(*arguments)[0][:2].tolist() == [1, 0]


def test_the_dense_solvers_error_names_the_sample_of_the_whole_batch(monkeypatch):
    x, y, a, b = problem("uniform", seed=5)
    solve_restricted = certified._solve_restricted

    def spoil(*arguments):
        solved = solve_restricted(*arguments[:-1], 10_000)
        solved[2][0][0] = 1
        return solved

    monkeypatch.setattr(certified, "_solve_restricted", spoil)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="sample 2.*raise max_iterations"):
        solve_transport(x, y, a, b, solver="certified", max_iterations=1, num_threads=1)


def test_weights_of_zero():
    x, y, a, b = problem("softmax_1", seed=6)
    a[:, ::3], b[:, 1::4] = 0, 0
    # Wrong values, which must not be used.
    x[:, ::3] *= 100
    result, exact = (solve_transport(x, y, a, b, solver=solver) for solver in ("certified", "exact"))
    torch.testing.assert_close(result.cost, exact.cost, rtol=1e-9, atol=0)
    assert (result.gap <= 1e-9 * result.cost).all()
    assert (result.plan.to_dense()[:, ::3] == 0).all() and (result.plan.to_dense()[..., 1::4] == 0).all()
    # Potentials are unique up to a shift.
    for got, expected, sign in zip(result.potentials, exact.potentials, (1, -1), strict=True):
        shift = sign * (result.potentials[0] - exact.potentials[0])[:, 1:2]
        torch.testing.assert_close(got, expected + shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 50), (40, 1)])
def test_a_single_point(n, m):
    x, y, _, _ = problem("uniform", (2, n, m, 8), seed=7)
    result = solve_transport(x, y, solver="certified")
    torch.testing.assert_close(result.cost, squared_distances(x, y).mean((1, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.plan.to_dense(), torch.full((2, n, m), 1 / (n * m), dtype=torch.float64))
    assert (result.gap <= 1e-12 * result.cost).all()


@pytest.mark.parametrize("solver", ["certified", "sinkhorn"])
def test_costs_beside_which_their_mean_vanishes(solver):
    """A share of it is too small for float32."""
    x = torch.tensor([[[0.0], [1e6]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1e-44]], dtype=torch.float64)
    result = solve_transport(x, x, weights, weights, solver=solver)
    assert result.cost.item() == pytest.approx(0, abs=1e-15) and result.gap.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("name", "value"), [("arcs_per_point", 0), ("rounds", -1)])
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        solve_transport(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), solver="certified", **{name: value})


@pytest.mark.parametrize(
    ("device", "rows", "columns", "expected"),
    [
        ("cpu", 512, 576, "exact"),
        ("cuda", 512, 576, "certified"),
        ("cuda", 192, 192, "certified"),
        ("cuda", 191, 576, "exact"),
        ("cuda", 576, 30, "exact"),
    ],
)
def test_auto_picks_by_device_and_size(device, rows, columns, expected):
    assert solve._pick_solver(torch.device(device), rows, columns) == expected


def test_auto_says_and_does_what_it_picked(monkeypatch):
    check_solver("auto")
    x, y, a, b = problem("softmax_1", seed=8)
    exact = solve_transport(x, y, a, b)
    result = solve_transport(x, y, a, b, solver="auto", num_threads=1)
    assert (exact.solver, result.solver) == ("exact", "exact") and torch.equal(result.cost, exact.cost)
    monkeypatch.setattr(solve, "_pick_solver", lambda *_: "certified")
    result = solve_transport(x, y, a, b, solver="auto", num_threads=1)
    assert result.solver == "certified"
    torch.testing.assert_close(result.cost, exact.cost, rtol=1e-9, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family):
    tensors = problem(family, SIZES[1], seed=9)
    expected = solve_transport(*tensors)
    result = solve_transport(*(tensor.cuda() for tensor in tensors), solver="auto")
    assert result.solver == "certified"
    assert all(value.is_cuda for value in (result.cost, result.gap, result.plan, *result.potentials))
    torch.testing.assert_close(result.cost.cpu(), expected.cost, rtol=1e-9, atol=0)
    assert (result.gap <= 1e-9 * result.cost).all()
