import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from dali_llava.train.transport import solve_transport


def random_problem(seed, batch=3, n=7, m=5, width=4, dtype=torch.float64):
    """Two clouds apart, with uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, width, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, m, width, generator=generator, dtype=torch.float64) + 0.5
    a = torch.rand(batch, n, generator=generator, dtype=torch.float64) + 0.2
    b = torch.rand(batch, m, generator=generator, dtype=torch.float64) + 0.2
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    return tuple(tensor.to(dtype) for tensor in (x, y, a, b))


def squared_distances(x, y):
    return (x[:, :, None] - y[:, None]).square().sum(-1)


def linear_program(cost, a, b):
    """Solves one problem with a generic solver."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    result = linprog(cost.ravel(), A_eq=np.vstack((rows, columns)), b_eq=np.concatenate((a, b)), method="highs")
    return result.fun


def test_exact_equals_a_linear_program():
    x, y, a, b = random_problem(0)
    result = solve_transport(x, y, a, b)
    cost = squared_distances(x, y)
    expected = [linear_program(cost[i].numpy(), a[i].numpy(), b[i].numpy()) for i in range(3)]
    np.testing.assert_allclose(result.cost.numpy(), expected, rtol=1e-10)
    assert result.gap.tolist() == [0, 0, 0]


def test_exact_equals_linear_sum_assignment():
    x, y, _, _ = random_problem(1, batch=2, n=30, m=30)
    result = solve_transport(x, y)
    for i, cost in enumerate(squared_distances(x, y).numpy()):
        rows, columns = linear_sum_assignment(cost)
        assert result.cost[i].item() == pytest.approx(cost[rows, columns].mean(), rel=1e-12)


def test_a_permutation_costs_nothing_and_is_found():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 20, 8, generator=generator, dtype=torch.float64)
    order = torch.randperm(20, generator=generator)
    result = solve_transport(x, x[:, order])
    assert result.cost.item() == pytest.approx(0, abs=1e-14)
    expected = torch.zeros(20, 20, dtype=torch.float64)
    expected[order, torch.arange(20)] = 1 / 20
    torch.testing.assert_close(result.plan.to_dense()[0], expected)


def test_on_a_line_the_sorted_points_pair_up():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 50, 1, generator=generator, dtype=torch.float64)
    y = 3 * torch.randn(4, 50, 1, generator=generator, dtype=torch.float64)
    expected = (x.sort(dim=1).values - y.sort(dim=1).values).square().mean((1, 2))
    torch.testing.assert_close(solve_transport(x, y).cost, expected, rtol=1e-12, atol=0)


def test_a_shift_costs_its_square():
    x, _, a, _ = random_problem(4)
    torch.testing.assert_close(solve_transport(x, x + 3, a, a).cost, torch.full((3,), 36.0, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["exact", "certified", "sinkhorn"])
def test_plan_has_the_marginals_and_the_cost(solver):
    x, y, a, b = random_problem(5)
    result = solve_transport(x, y, a, b, solver=solver)
    assert result.plan.is_sparse and result.plan.is_coalesced()
    plan = result.plan.to_dense()
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(2), a, rtol=0, atol=1e-14)
    torch.testing.assert_close(plan.sum(1), b, rtol=0, atol=1e-14)
    torch.testing.assert_close((plan * squared_distances(x, y)).sum((1, 2)), result.cost, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", ["exact", "certified", "sinkhorn"])
def test_potentials_are_feasible_and_their_value_is_the_cost_less_the_gap(solver):
    x, y, a, b = random_problem(6)
    result = solve_transport(x, y, a, b, solver=solver)
    u, v = result.potentials
    assert (u[..., None] + v[:, None] <= squared_distances(x, y) + 1e-12).all()
    lower = (a * u).sum(1) + (b * v).sum(1)
    torch.testing.assert_close(lower, result.cost - result.gap, rtol=1e-12, atol=0)


def test_exact_is_sparse():
    x, y, a, b = random_problem(7, n=40, m=30)
    assert result_sizes(solve_transport(x, y, a, b).plan).max() <= 40 + 30 - 1


def result_sizes(plan):
    return torch.bincount(plan.indices()[0])


def test_sinkhorn_stays_within_its_gap_of_the_optimum():
    x, y, a, b = random_problem(8, n=30, m=20, width=8)
    exact = solve_transport(x, y, a, b).cost
    coarse = solve_transport(x, y, a, b, solver="sinkhorn")
    fine = solve_transport(
        x, y, a, b, solver="sinkhorn", eps=(0.1, 0.03, 0.01, 0.003), num_iterations=(20, 40, 80, 800)
    )
    for result in (coarse, fine):
        error = result.cost - exact
        assert (error >= -1e-12).all() and (error <= result.gap).all()
    assert (fine.gap < coarse.gap).all()
    assert (fine.gap < 0.02 * exact).all()


def test_sinkhorn_relative_eps_does_not_see_the_unit_and_absolute_eps_does():
    x, y, a, b = random_problem(9)
    relative = [solve_transport(s * x, s * y, a, b, solver="sinkhorn").cost / s**2 for s in (1.0, 40.0)]
    torch.testing.assert_close(*relative, rtol=1e-4, atol=0)
    mean = (a[:, None] @ squared_distances(x, y) @ b[..., None])[0].item()
    options = {"solver": "sinkhorn", "num_iterations": (50,)}
    first = [tensor[:1] for tensor in (x, y, a, b)]
    absolute = solve_transport(*first, eps=(0.05 * mean,), relative=False, **options).cost
    torch.testing.assert_close(absolute, solve_transport(*first, eps=(0.05,), **options).cost, rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", ["exact", "certified", "sinkhorn"])
def test_symmetric(solver):
    x, y, a, b = random_problem(10)
    forth, back = solve_transport(x, y, a, b, solver=solver), solve_transport(y, x, b, a, solver=solver)
    rtol = 1e-12 if solver != "sinkhorn" else 0.05
    torch.testing.assert_close(forth.cost, back.cost, rtol=rtol, atol=0)


def test_finite_differences_of_points():
    x, y, a, b = random_problem(11)
    assert torch.autograd.gradcheck(
        lambda x, y: solve_transport(x, y, a, b).cost, (x.requires_grad_(), y.requires_grad_()), eps=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("which", ["a", "b"])
def test_finite_differences_of_weights(which):
    """With respect to changes that preserve the sum, the only ones possible for weights."""
    x, y, a, b = random_problem(12, batch=1)
    weights = a if which == "a" else b

    def cost(moved):
        return solve_transport(x, y, moved if which == "a" else a, moved if which == "b" else b).cost

    weights.requires_grad_()
    (gradient,) = torch.autograd.grad(cost(weights).sum(), weights)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)
    for i in range(1, weights.shape[1]):
        step = torch.zeros_like(weights)
        step[0, 0], step[0, i] = 1e-6, -1e-6
        with torch.no_grad():
            slope = (cost(weights + step) - cost(weights - step)).item() / 2e-6
        assert (gradient[0, 0] - gradient[0, i]).item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_weight_gradients_are_centred_potentials():
    x, y, a, b = random_problem(13)
    result = solve_transport(x, y, a.requires_grad_(), b.requires_grad_())
    da, db = torch.autograd.grad(result.cost.sum(), (a, b))
    for gradient, potential in zip((da, db), result.potentials, strict=True):
        torch.testing.assert_close(gradient, potential - potential.mean(1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "certified", "sinkhorn"])
def test_point_gradients_are_those_of_a_fixed_plan(solver):
    x, y, a, b = random_problem(14)
    result = solve_transport(x.requires_grad_(), y.requires_grad_(), a, b, solver=solver)
    scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gradients = torch.autograd.grad((scale * result.cost).sum(), (x, y))
    fixed = (scale * (result.plan.to_dense() * squared_distances(x, y)).sum((1, 2))).sum()
    for got, expected in zip(gradients, torch.autograd.grad(fixed, (x, y)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_only_what_asks_for_a_gradient_gets_one():
    x, y, a, b = random_problem(15)
    solve_transport(x.requires_grad_(), y, a, b).cost.sum().backward()
    assert x.grad is not None and y.grad is None
    assert not solve_transport(x.detach(), y, a, b).cost.requires_grad


@pytest.mark.parametrize("solver", ["exact", "certified", "sinkhorn"])
def test_weight_zero_is_as_good_as_removed(solver):
    x, y, a, b = random_problem(16, batch=1)
    a[0, [1, 4]] = 0
    b[0, 2] = 0
    kept_x, kept_y = a[0] > 0, b[0] > 0
    x.requires_grad_()
    whole = solve_transport(x, y, a, b, solver=solver)
    part = solve_transport(x[:, kept_x], y[:, kept_y], a[:, kept_x], b[:, kept_y], solver=solver)
    rtol = 1e-12 if solver != "sinkhorn" else 1e-5
    torch.testing.assert_close(whole.cost, part.cost, rtol=rtol, atol=0)
    (of_whole,), (of_part,) = (torch.autograd.grad(result.cost.sum(), x) for result in (whole, part))
    torch.testing.assert_close(of_whole, of_part, rtol=rtol, atol=1e-4 if solver == "sinkhorn" else 1e-12)
    assert (of_whole[0, ~kept_x] == 0).all()


def test_potential_of_weight_zero_is_the_cost_of_its_first_grain():
    x, y, a, b = random_problem(17, batch=1)
    a[0, 3] = 0
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(solve_transport(x, y, a, b).cost.sum(), a)
    step = torch.zeros_like(a)
    step[0, 3], step[0, 0] = 1e-7, -1e-7
    with torch.no_grad():
        scaled = a / a.sum()
        slope = (solve_transport(x, y, scaled + step, b).cost - solve_transport(x, y, scaled, b).cost).item() / 1e-7
    sum_of_a = a.sum().item()
    assert (gradient[0, 3] - gradient[0, 0]).item() * sum_of_a == pytest.approx(slope, rel=1e-5)


def test_weights_are_rescaled():
    x, y, a, b = random_problem(18)
    torch.testing.assert_close(solve_transport(x, y, 3 * a, b).cost, solve_transport(x, y, a, b).cost)


def test_bfloat16_weights_and_points():
    """Weights that sum to 1 only approximately, as those of a half-precision softmax."""
    x, y, a, b = random_problem(19, n=64, m=36, width=16, dtype=torch.bfloat16)
    result = solve_transport(x, y, a, b)
    assert result.cost.dtype == torch.float32
    expected = solve_transport(x.double(), y.double(), a.double(), b.double()).cost
    torch.testing.assert_close(result.cost.double(), expected, rtol=1e-6, atol=0)
    assert result.gap.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_any_unit_will_do(scale):
    x, y, a, b = random_problem(20)
    expected = solve_transport(x, y, a, b).cost
    torch.testing.assert_close(
        solve_transport(scale * x, scale * y, a, b).cost / scale**2, expected, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("solver", ["exact", "certified", "sinkhorn"])
def test_points_that_are_all_one_cost_nothing(solver):
    x = torch.full((2, 4, 3), 1.1, requires_grad=True)
    result = solve_transport(x, x.detach()[:, :2], solver=solver)
    result.cost.sum().backward()
    assert result.cost.tolist() == [0, 0] and result.gap.tolist() == [0, 0]
    torch.testing.assert_close(x.grad, torch.zeros_like(x))


def test_threads_do_not_change_the_answer():
    x, y, a, b = random_problem(21, batch=9, n=20, m=15)
    one, four = (solve_transport(x, y, a, b, num_threads=threads) for threads in (1, 4))
    assert torch.equal(one.cost, four.cost) and torch.equal(one.plan.to_dense(), four.plan.to_dense())


def test_a_simplex_cut_short_is_an_error():
    x, y, a, b = random_problem(22, n=40, m=40)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="sample 0.*raise max_iterations"):
        solve_transport(x, y, a, b, max_iterations=1, num_threads=1)


def test_under_autocast():
    x, y, a, b = random_problem(23, dtype=torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = solve_transport(x, y, a, b).cost
        (gradient,) = torch.autograd.grad(inside.sum(), x)
    outside = solve_transport(x, y, a, b).cost
    assert torch.equal(inside, outside)
    assert torch.equal(gradient, torch.autograd.grad(outside.sum(), x)[0])


def test_unknown_solver_names_the_known():
    known = "'exact', 'sinkhorn', 'certified', 'partial', 'unbalanced', 'auto'"
    with pytest.raises(ValueError, match=f"'simplex'.*{known}"):
        solve_transport(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), solver="simplex")


BAD = [
    ("x", lambda x: x[0], "x must be"),
    ("y", lambda y: y[:2], "x holds 3 samples and y 2"),
    ("y", lambda y: y[..., :3], "x is 4 wide and y 3"),
    ("x", lambda x: x[:, :0], "x holds no tokens"),
    ("x", lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), "x holds a NaN.* sample 1"),
    ("y", lambda y: y.index_fill(0, torch.tensor([2]), -torch.inf), "y holds a NaN or an infinity in sample 2"),
    ("a", lambda a: a[:, 1:], r"a must be of shape \(3, 7\)"),
    ("a", lambda a: a.index_fill(0, torch.tensor([2]), torch.nan), "a holds a NaN.* sample 2"),
    ("b", lambda b: b.index_fill(0, torch.tensor([1]), torch.inf), "b holds a NaN or an infinity in sample 1"),
    ("b", lambda b: b.index_fill(1, torch.tensor([0]), -0.1), "b holds a negative weight in sample 0"),
    ("a", lambda a: a.index_fill(0, torch.tensor([1]), 0.0), "a holds no weight above 0 in sample 1"),
    (
        "x",
        lambda x: x.index_fill(0, torch.tensor([1]), 1e200) + x,
        "x holds numbers up to 1e.200 in sample 1",
    ),
]


@pytest.mark.parametrize("solver", ["exact", "certified", "sinkhorn"])
@pytest.mark.parametrize(("name", "spoil", "message"), BAD)
def test_bad_input_is_named(solver, name, spoil, message):
    arguments = dict(zip(("x", "y", "a", "b"), random_problem(24), strict=True))
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ValueError, match=message):
        solve_transport(**arguments, solver=solver)


def test_wrong_kinds():
    x, y, a, b = random_problem(25)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        solve_transport(x.long(), y)
    with pytest.raises(TypeError, match="a must be a floating-point tensor"):
        solve_transport(x, y, a.tolist(), b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": (0.1,), "num_iterations": (1, 2)}, "one length"),
        ({"eps": (0.0,), "num_iterations": (1,)}, "eps must be positive"),
    ],
)
def test_bad_sinkhorn_options(options, message):
    with pytest.raises(ValueError, match=message):
        solve_transport(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), solver="sinkhorn", **options)
