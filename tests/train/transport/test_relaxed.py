"""Transport that leaves part of the mass in place: the solvers "partial" and "unbalanced"."""

import math

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog

from dali_llava.train.losses import TransportLoss
from dali_llava.train.transport import partial, solve_transport, unbalanced
from dali_llava.train.transport.simplex import NoPlanError


# Options with which both solvers find the optimum to many digits.
FINE = {
    "partial": {"mass": 0.7},
    "unbalanced": {"relaxation": 2.0, "relative": False, "tolerance": 1e-13, "max_iterations": 20_000},
}
solvers = pytest.mark.parametrize("solver", list(FINE))


def random_problem(seed, batch=2, n=7, m=5, width=4):
    """Two clouds apart, with uneven weights, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, width, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, m, width, generator=generator, dtype=torch.float64) + 0.5
    a = torch.rand(batch, n, generator=generator, dtype=torch.float64) + 0.2
    b = torch.rand(batch, m, generator=generator, dtype=torch.float64) + 0.2
    return x, y, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def squared_distances(x, y):
    return (x[:, :, None] - y[:, None]).square().sum(-1)


def on_a_line(*values):
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def divergence(p, q):
    return (torch.special.xlogy(p, p / q) - p + q).sum(-1)


def objective(plan, cost, a, b, rho):
    penalty = divergence(plan.sum(2), a) + divergence(plan.sum(1), b)
    return (plan * cost).sum((1, 2)) + rho * penalty


@pytest.mark.parametrize("mass", [0.5, 0.3])
def test_partial_moves_the_near_pair_only(mass):
    result = solve_transport(on_a_line(0.0, 10.0), on_a_line(0.5, 30.0), solver="partial", mass=mass)
    expected = torch.tensor([[[mass, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(result.plan.to_dense(), expected, rtol=0, atol=1e-15)
    assert result.cost.item() == pytest.approx(0.25 * mass, rel=1e-12)
    assert 0 <= result.gap.item() < 1e-12


def test_partial_on_paper():
    """The half of the first point moves at a cost of 1 per unit, and the missing part of the second one at 4."""
    a, b = (torch.tensor([weights], dtype=torch.float64) for weights in ([0.5, 0.5], [0.7, 0.3]))
    result = solve_transport(on_a_line(1.0, 2.0), on_a_line(0.0, 50.0), a, b, solver="partial", mass=0.6)
    assert result.cost.item() == pytest.approx(0.5 * 1 + 0.1 * 4, rel=1e-12)


def partial_linear_program(cost, a, b, mass):
    """Solves one problem with a generic solver."""
    n, m = cost.shape
    marginals = np.vstack((np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))))
    total, limits = np.ones((1, n * m)), np.concatenate((a, b))
    return linprog(cost.ravel(), A_ub=marginals, b_ub=limits, A_eq=total, b_eq=[mass], method="highs").fun


@pytest.mark.parametrize("mass", [0.05, 0.4, 0.8, 0.97])
def test_partial_equals_a_linear_program_and_pot(mass):
    x, y, a, b = random_problem(0, n=12, m=9)
    result = solve_transport(x, y, a, b, solver="partial", mass=mass)
    for i, cost in enumerate(squared_distances(x, y).numpy()):
        weights = a[i].numpy(), b[i].numpy()
        expected = partial_linear_program(cost, *weights, mass)
        assert result.cost[i].item() == pytest.approx(expected, rel=1e-10)
        plan = ot.partial.partial_wasserstein(*weights, cost, m=mass)
        assert result.cost[i].item() == pytest.approx((plan * cost).sum(), rel=1e-10)
        np.testing.assert_allclose(result.plan.to_dense()[i].numpy(), plan, rtol=0, atol=1e-12)
        assert result.cost[i].item() == pytest.approx((result.plan.to_dense()[i].numpy() * cost).sum(), rel=1e-12)
    assert result.plan.is_coalesced() and result.plan.values().min() > 0
    assert (result.gap >= 0).all() and (result.gap <= 1e-12 * result.cost).all()


def test_partial_tends_to_exact():
    x, y, a, b = random_problem(2, n=20, m=15)
    exact = solve_transport(x, y, a, b)
    costs = [solve_transport(x, y, a, b, solver="partial", mass=1 - left).cost for left in (0.3, 1e-2, 1e-5, 1e-12, 0)]
    assert all((less < more).all() for less, more in zip(costs[:-2], costs[1:-1], strict=True))
    torch.testing.assert_close(costs[-2], exact.cost, rtol=1e-10, atol=0)
    assert torch.equal(costs[-1], exact.cost)


def test_partial_keeps_off_a_far_point():
    x, y, _, _ = random_problem(3, batch=1, n=10, m=10)
    x[0, 4] += 100
    x.requires_grad_()
    cost = solve_transport(x, y, solver="partial", mass=0.9).cost
    (gradient,) = torch.autograd.grad(cost.sum(), x)
    assert cost.item() < 10 and solve_transport(x, y).cost.item() > 1000
    assert gradient[0, 4].norm() < 1e-12 and (gradient[0, :4].norm(dim=1) > 1e-3).all()


def test_partial_cut_short_is_an_error():
    x, y, a, b = random_problem(4, n=40, m=40)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="no partial .* sample 0.*raise max_iterations"):
        solve_transport(x, y, a, b, solver="partial", max_iterations=1, num_threads=1)


@pytest.mark.parametrize(
    ("masses", "prices", "message"),
    [
        (0.5, 1, "does not move the share"),
        (np.nan, 1, "does not move the share"),
        (1, np.nan, "below the lower bound"),
    ],
)
def test_partial_takes_no_plan_on_trust(masses, prices, message, monkeypatch):
    def spoilt(*arguments):
        solution = dense_simplex(*arguments)
        solution.masses, solution.v = masses * solution.masses, prices * solution.v
        return solution

    dense_simplex = partial.dense_simplex
    monkeypatch.setattr(partial, "dense_simplex", spoilt)
    with pytest.raises(RuntimeError, match=f"no partial transport for sample 0: .*{message}"):
        solve_transport(*random_problem(5), solver="partial", num_threads=1)


@pytest.mark.parametrize(("distance", "rho"), [(1.0, 0.3), (3.0, 2.0), (0.1, 5.0)])
def test_unbalanced_pair_keeps_what_the_formula_says(distance, rho):
    options = {"relaxation": rho, "relative": False, "tolerance": 0.0}
    result = solve_transport(on_a_line(0.0), on_a_line(distance), solver="unbalanced", **options)
    mass = math.exp(-(distance**2) / (2 * rho))
    assert result.plan.to_dense().item() == pytest.approx(mass, rel=1e-12)
    assert result.cost.item() == pytest.approx(2 * rho * (1 - mass), rel=1e-12)
    assert 0 <= result.gap.item() < 1e-12


def test_unbalanced_strength_counts_in_mean_costs():
    for distance in (1e-3, 1.0, 1e4):
        result = solve_transport(on_a_line(0.0), on_a_line(distance), solver="unbalanced", relaxation=0.5)
        assert result.plan.to_dense().item() == pytest.approx(math.exp(-1), rel=1e-12)
    x, y, a, b = random_problem(6)
    mean = (a[:, None] @ squared_distances(x, y) @ b[..., None])[:, 0, 0]
    relative = solve_transport(x, y, a, b, solver="unbalanced", relaxation=0.7, tolerance=0.0)
    for i in range(2):
        sample = [tensor[i : i + 1] for tensor in (x, y, a, b)]
        options = {"relaxation": 0.7 * mean[i].item(), "relative": False, "tolerance": 0.0}
        absolute = solve_transport(*sample, solver="unbalanced", **options)
        assert absolute.cost.item() == pytest.approx(relative.cost[i].item(), rel=1e-11)


@pytest.mark.parametrize("relaxation", [0.05, 0.3, 1.0])
def test_unbalanced_equals_pot(relaxation):
    x, y, a, b = random_problem(7, batch=1)
    cost = squared_distances(x, y)
    rho = relaxation * (a[:, None] @ cost @ b[..., None]).item()
    plan = ot.unbalanced.mm_unbalanced(a[0].numpy(), b[0].numpy(), cost[0].numpy(), rho, numItermax=20_000)
    result = solve_transport(x, y, a, b, solver="unbalanced", relaxation=relaxation, tolerance=1e-12)
    expected = objective(torch.from_numpy(plan)[None], cost, a, b, rho)
    torch.testing.assert_close(result.cost, expected, rtol=1e-10, atol=0)
    np.testing.assert_allclose(result.plan.to_dense()[0].numpy(), plan, rtol=0, atol=1e-6)


@pytest.mark.parametrize("relaxation", [1e-4, 0.03, 0.3, 1.0, 10.0, 1000.0])
def test_unbalanced_gap_is_small_and_cost_is_the_objective(relaxation):
    x, y, a, b = random_problem(8, n=40, m=30)
    result = solve_transport(x, y, a, b, solver="unbalanced", relaxation=relaxation, tolerance=1e-3)
    assert (result.gap >= 0).all() and (result.gap <= 1e-3 * result.cost).all()
    cost = squared_distances(x, y)
    rho = relaxation * (a[:, None] @ cost @ b[..., None])[:, 0, 0]
    expected = objective(result.plan.to_dense(), cost, a, b, rho)
    torch.testing.assert_close(result.cost, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("relaxation", [0.1, 1.0, 10.0])
def test_unbalanced_gap_bounds_the_error_wherever_the_iterations_stop(relaxation):
    x, y, a, b = random_problem(9, n=20, m=15)
    options = {"solver": "unbalanced", "relaxation": relaxation, "tolerance": 0.0}
    runs = [solve_transport(x, y, a, b, **options, max_iterations=count) for count in (1, 10, 100, 10_000)]
    best = runs[-1]
    for run in runs:
        assert (run.gap >= 0).all()
        assert (run.cost >= best.cost - best.gap).all() and (run.cost - run.gap <= best.cost).all()
    assert (runs[0].gap > 10 * best.gap).all()


def test_unbalanced_tends_to_exact():
    x, y, a, b = random_problem(10, n=12, m=9)
    exact = solve_transport(x, y, a, b).cost
    strengths = (0.1, 1.0, 10.0, 100.0, 1e4, 1e6)
    results = [solve_transport(x, y, a, b, solver="unbalanced", relaxation=strength) for strength in strengths]
    for weaker, stronger in zip(results[:-1], results[1:], strict=True):
        assert (weaker.cost - weaker.gap < stronger.cost).all()
    errors = [(result.cost / exact - 1).abs().max().item() for result in results]
    assert errors[0] > 0.5 and errors[3] < 0.01 and errors[4] < 1e-3 and errors[5] < 1e-5
    torch.testing.assert_close(results[-1].plan.to_dense().sum(2), a, rtol=1e-4, atol=0)


def test_unbalanced_keeps_off_a_far_point():
    x, y, _, _ = random_problem(11, batch=1, n=10, m=10)
    x[0, 4] += 100
    x.requires_grad_()
    result = solve_transport(x, y, solver="unbalanced", relaxation=5.0, relative=False)
    (gradient,) = torch.autograd.grad(result.cost.sum(), x)
    assert result.plan.to_dense()[0, 4].sum() < 1e-100 and gradient[0, 4].norm() < 1e-90
    assert result.cost.item() < 10 and (gradient[0, :4].norm(dim=1) > 1e-3).all()


def test_unbalanced_finds_the_arcs_that_its_guess_lacks(monkeypatch):
    x, y, a, b = random_problem(12, n=40, m=30)
    options = {"solver": "unbalanced", "relaxation": 0.3, "tolerance": 1e-7}
    whole = solve_transport(x, y, a, b, **options)
    monkeypatch.setattr(unbalanced, "_FEWEST_ARCS", 1)
    monkeypatch.setattr(unbalanced, "_ARCS_PER_POINT", 1)
    counts = []

    def spy(problem, indices, *others):
        counts.append(indices.shape[1])
        return iterate(problem, indices, *others)

    iterate = unbalanced._iterate
    monkeypatch.setattr(unbalanced, "_iterate", spy)
    few = solve_transport(x, y, a, b, **options, num_threads=1)
    torch.testing.assert_close(few.cost, whole.cost, rtol=2e-7, atol=0)
    assert counts[0] == 70 and 70 < max(counts) < 1200
    assert few.plan.is_coalesced() and (few.gap <= 1e-7 * few.cost).all()


def test_unbalanced_relative_strength_is_a_constant_to_the_gradient():
    x, y, a, b = random_problem(13, batch=1)
    mean = (a[:, None] @ squared_distances(x, y) @ b[..., None]).item()
    gradients = []
    for options in ({"relaxation": 0.5}, {"relaxation": 0.5 * mean, "relative": False}):
        own = [tensor.clone().requires_grad_() for tensor in (x, y, a, b)]
        cost = solve_transport(*own, solver="unbalanced", tolerance=0.0, **options).cost
        gradients.append(torch.autograd.grad(cost.sum(), own))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spoilt", ["plan", "simplex"])
def test_unbalanced_failure_names_the_sample(spoilt, monkeypatch):
    def fail(*_, **__):
        if spoilt == "simplex":
            raise NoPlanError("numItermax reached")
        return np.full((7, 5), np.nan)

    owner, name = (unbalanced, "dense_simplex") if spoilt == "simplex" else (ot.unbalanced, "mm_unbalanced")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="no unbalanced transport for sample 0: "):
        solve_transport(*random_problem(14), solver="unbalanced", num_threads=1)


@solvers
@pytest.mark.parametrize("coarse", [False, True])
def test_potentials_are_feasible_and_their_value_is_the_cost_less_the_gap(solver, coarse):
    x, y, a, b = random_problem(20)
    a[0, 2] = 0.0
    a[0] /= a[0].sum()
    options = {**FINE[solver], **({"max_iterations": 3} if coarse and solver == "unbalanced" else {})}
    result = solve_transport(x, y, a, b, solver=solver, **options)
    u, v = result.potentials
    assert (u[..., None] + v[:, None] <= squared_distances(x, y) + 1e-12).all()
    torch.testing.assert_close((a * u).sum(1) + (b * v).sum(1), result.cost - result.gap, rtol=1e-12, atol=0)


@solvers
def test_finite_differences_of_points(solver):
    x, y, a, b = random_problem(21, n=5, m=4, width=2)
    points = x.requires_grad_(), y.requires_grad_()

    def cost(x, y):
        return solve_transport(x, y, a, b, solver=solver, **FINE[solver]).cost

    assert torch.autograd.gradcheck(cost, points, eps=1e-5, atol=1e-6)


@solvers
@pytest.mark.parametrize("which", [2, 3])
def test_finite_differences_of_weights(solver, which):
    """With respect to changes that preserve the sum, the only ones possible for weights."""
    problem = list(random_problem(44, batch=1))
    weights = problem[which].requires_grad_()

    def cost(moved):
        own = [moved if i == which else tensor for i, tensor in enumerate(problem)]
        return solve_transport(*own, solver=solver, **FINE[solver]).cost

    (gradient,) = torch.autograd.grad(cost(weights).sum(), weights)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() > 0.1
    for i in range(1, weights.shape[1]):
        step = torch.zeros_like(weights)
        step[0, 0], step[0, i] = 1e-5, -1e-5
        with torch.no_grad():
            slope = (cost(weights + step) - cost(weights - step)).item() / 2e-5
        assert (gradient[0, 0] - gradient[0, i]).item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


@solvers
def test_weight_zero_is_as_good_as_removed_and_its_gradient_is_that_of_its_first_grain(solver):
    x, y, a, b = random_problem(23, batch=1)
    a[0, [1, 4]] = 0
    b[0, 2] = 0
    x[0, 1] = 1e3
    a, b = a / a.sum(), b / b.sum()
    kept_x, kept_y = a[0] > 0, b[0] > 0
    x.requires_grad_()
    a.requires_grad_()
    options = {"solver": solver, **FINE[solver]}
    whole = solve_transport(x, y, a, b, **options)
    part = solve_transport(x[:, kept_x], y[:, kept_y], a[:, kept_x].detach(), b[:, kept_y], **options)
    torch.testing.assert_close(whole.cost, part.cost, rtol=1e-12, atol=0)
    assert whole.plan.to_dense()[0, ~kept_x].sum() == 0 and whole.plan.to_dense()[0, :, ~kept_y].sum() == 0
    of_whole, of_a = torch.autograd.grad(whole.cost.sum(), (x, a))
    (of_part,) = torch.autograd.grad(part.cost.sum(), x)
    torch.testing.assert_close(of_whole, of_part, rtol=0, atol=1e-9)
    assert (of_whole[0, ~kept_x] == 0).all() and of_a.isfinite().all()
    for i in (1, 4):
        step = torch.zeros_like(a)
        step[0, i], step[0, 0] = 1e-6, -1e-6
        with torch.no_grad():
            slope = (solve_transport(x, y, a + step, b, **options).cost - whole.cost).item() / 1e-6
        assert (of_a[0, i] - of_a[0, 0]).item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


@solvers
def test_float32_point_gradients_are_those_of_a_fixed_plan(solver):
    x, y, a, b = (tensor.float() for tensor in random_problem(24))
    result = solve_transport(x.requires_grad_(), y, a, b, solver=solver)
    fixed = (result.plan.to_dense() * squared_distances(x.double(), y.double())).sum()
    assert result.cost.dtype == torch.float32
    gradients = (torch.autograd.grad(cost, x)[0] for cost in (result.cost.sum(), fixed))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@solvers
def test_symmetric(solver):
    x, y, a, b = random_problem(25)
    sides = ((x, y, a, b), (y, x, b, a))
    forth, back = (solve_transport(*problem, solver=solver, **FINE[solver]).cost for problem in sides)
    torch.testing.assert_close(forth, back, rtol=1e-11, atol=0)


@solvers
def test_any_unit_will_do(solver):
    x, y, a, b = random_problem(26)
    small, one, large = (solve_transport(s * x, s * y, a, b, solver=solver).cost / s**2 for s in (1e-9, 1.0, 1e9))
    torch.testing.assert_close(torch.stack((small, large)), one.expand(2, -1), rtol=1e-9, atol=0)


@solvers
def test_points_that_are_all_one_cost_nothing(solver):
    x = torch.full((2, 4, 3), 1.1, requires_grad=True)
    result = solve_transport(x, x.detach()[:, :2], solver=solver)
    result.cost.sum().backward()
    torch.testing.assert_close(result.cost, torch.zeros(2), rtol=0, atol=1e-15)
    assert (result.gap >= 0).all() and (result.gap < 1e-14).all()
    torch.testing.assert_close(x.grad, torch.zeros_like(x))


@solvers
def test_threads_do_not_change_the_answer(solver):
    x, y, a, b = random_problem(27, batch=5, n=20, m=15)
    one, four = (solve_transport(x, y, a, b, solver=solver, num_threads=threads) for threads in (1, 4))
    assert torch.equal(one.cost, four.cost) and torch.equal(one.plan.to_dense(), four.plan.to_dense())


BAD = [
    ("partial", {"mass": 0.0}, "mass must be above 0 and at most 1, not 0.0"),
    ("partial", {"mass": 1.01}, "mass must be above 0 and at most 1"),
    ("partial", {"mass": math.nan}, "mass must be above 0 and at most 1"),
    ("partial", {"max_iterations": 0}, "max_iterations must be at least 1, not 0"),
    ("unbalanced", {"relaxation": 0.0}, "relaxation must be above 0 and finite, not 0.0"),
    ("unbalanced", {"relaxation": math.inf}, "relaxation must be above 0 and finite"),
    ("unbalanced", {"tolerance": -1e-3}, "tolerance must be from 0 to 1, not -0.001"),
    ("unbalanced", {"max_iterations": 0}, "max_iterations must be at least 1, not 0"),
]


@pytest.mark.parametrize(("solver", "options", "message"), BAD)
def test_bad_options_are_named(solver, options, message):
    with pytest.raises(ValueError, match=message):
        solve_transport(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), solver=solver, **options)


@solvers
def test_loss_does_not_see_masked_tokens(solver):
    audio, image, _, _ = random_problem(28, n=9, m=8)
    audio.requires_grad_()
    audio_mask, image_mask = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    audio_mask[1, 6:], image_mask[0, :2] = False, False
    output = TransportLoss(solver, FINE[solver])(audio, image, audio_mask, image_mask)
    (gradient,) = torch.autograd.grad(output.loss, audio)
    costs = [
        solve_transport(audio[i : i + 1, own], image[i : i + 1, its], solver=solver, **FINE[solver]).cost
        for i, (own, its) in enumerate(zip(audio_mask, image_mask, strict=True))
    ]
    (expected,) = torch.autograd.grad(torch.cat(costs).mean(), audio)
    assert output.loss.item() == pytest.approx(torch.cat(costs).mean().item(), rel=1e-11)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)
    assert (gradient[1, 6:] == 0).all() and gradient.abs().max() > 0.01
    assert output.logs["transport_cost"] == output.loss.item() and 0 <= output.logs["max_gap"] < 1e-9
