"""Compare the speed of exact batched transport with that of POT's emd2 in a loop over the pairs.

Both run forward and backward with respect to the audio tokens. The tokens are synthetic float32: 512 audio and 576
image tokens of width 1024. Differences are relative to the loop in float64, because POT returns float32 costs for
float32 tokens. Our costs are computed in float64 for this comparison, our gradients in the timed precision. The
benchmark takes a few minutes on two cores and 4 GB of memory:

    python benchmarks/transport.py
    python benchmarks/transport.py --families uniform lowrank --solvers exact sinkhorn --batch-sizes 8 --repeats 3

Families of problems:
    uniform     two Gaussian clouds, equal weights
    softmax1    the same clouds with weights softmax(z), z standard normal
    softmax3    the same clouds with weights softmax(3 z)
    lowrank     clouds in a subspace of 8 dimensions, plus 1% noise; equal weights
    duplicate   each token repeated four times; equal weights, many optimal plans
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import (
    add_batch_sizes,
    benchmark_parser,
    compare,
    format_spread,
    load_average,
    must,
    parse_benchmark,
    save,
    show,
    time_in_turns,
)

from dali_llava.train.losses import TransportLoss
from dali_llava.train.transport import solve_transport


EXACT_SOLVERS = ("exact", "certified", "auto")
# Approximate by design, so there are no requirements.
APPROXIMATE_SOLVERS = ("sinkhorn",)
# Required speedup over the loop. "certified" is designed for GPUs; gpu.py has its speed requirement.
TIMES_FASTER = {"exact": 1.8, "auto": 1.8}
# Requirements on the exact solvers: largest relative differences to the loop, and largest gap to the lower bound.
COST_DIFFERENCE = 1e-9
GRADIENT_DIFFERENCE = 1e-6
GAP_OVER_COST = 1e-9
SHARPNESS = {"softmax1": 1.0, "softmax3": 3.0}
FAMILIES = ("uniform", *SHARPNESS, "lowrank", "duplicate")
# Families with several optimal plans: each plan has its own gradient, so gradients are not compared.
TIED_FAMILIES = ("duplicate",)
LOOP = "POT loop"
TITLE = "Transport, forward and backward (min / median / max)"
COLUMNS = ["family", "B", "solver", "seconds", "times faster", "cost diff.", "grad. diff.", "gap / cost"]


@dataclass
class Problem:
    """B pairs: x (B, N, D), which requires a gradient, y (B, M, D), weights (B, N) and (B, M), or None if equal."""

    x: torch.Tensor
    y: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor] | None

    def double(self) -> "Problem":
        """The problem in float64. Weights are normalised again: POT's cost scales with their sum, ours does not."""
        weights = None
        if self.weights is not None:
            weights = tuple(part / part.sum(dim=1, keepdim=True) for part in map(torch.Tensor.double, self.weights))
        return Problem(self.x.detach().double().requires_grad_(), self.y.double(), weights)


def make_problem(family: str, batch: int, shape: tuple[int, int, int], device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    *counts, width = shape

    def cloud(count: int) -> torch.Tensor:
        if family == "lowrank":
            points = torch.randn(batch, count, 8, generator=generator) @ basis
            return points + 0.01 * torch.randn(batch, count, width, generator=generator)
        if family == "duplicate":
            points = torch.randn(batch, -(-count // 4), width, generator=generator)
            return points.repeat(1, 4, 1)[:, :count].contiguous()
        return torch.randn(batch, count, width, generator=generator)

    basis = torch.randn(batch, 8, width, generator=generator)
    x, y = (cloud(count) for count in counts)
    weights = None
    if family in SHARPNESS:
        weights = tuple(
            (SHARPNESS[family] * torch.randn(batch, count, generator=generator)).softmax(dim=1).to(device)
            for count in counts
        )
    return Problem(x.to(device).requires_grad_(), (0.9 * y + 0.1).to(device), weights)


def loop_costs(problem: Problem) -> torch.Tensor:
    """Baseline costs (B,): for each pair, distances by torch, plan and cost by POT."""
    import ot

    costs = []
    for sample, (x, y) in enumerate(zip(problem.x, problem.y, strict=True)):
        if problem.weights is None:
            a, b = x.new_full((len(x),), 1 / len(x)), y.new_full((len(y),), 1 / len(y))
        else:
            a, b = (part[sample] for part in problem.weights)
        costs.append(ot.emd2(a, b, torch.cdist(x, y).square(), numItermax=10_000_000))
    return torch.stack(costs)


def run_loop(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Costs (B,) and the gradient of their mean (B, N, D)."""
    costs = loop_costs(problem)
    return costs.detach(), torch.autograd.grad(costs.mean(), problem.x)[0]


def run_ours(problem: Problem, solver: str) -> torch.Tensor:
    """Gradient (B, N, D) of the mean cost, computed as in training."""
    if problem.weights is None:
        loss = TransportLoss(solver=solver)(problem.x, problem.y).loss
    else:
        loss = solve_transport(problem.x, problem.y, *problem.weights, solver=solver).cost.mean()
    return torch.autograd.grad(loss, problem.x)[0]


def agreement(problem: Problem, solvers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Largest differences to the loop in float64, for costs in float64 and gradients in the timed precision.

    Cost differences are relative to the cost of each pair, gradient differences to the largest gradient entry of the
    batch, and gaps to the cost. The result also names the solver that was used, which "auto" selects.
    """
    wide = problem.double()
    costs, gradient = run_loop(wide)

    def gradient_difference(other: torch.Tensor) -> float:
        return ((other.double() - gradient).abs().max() / gradient.abs().max()).item()

    loop_costs_32, loop_gradient_32 = run_loop(problem)
    found = {
        LOOP: {
            "cost_difference": ((loop_costs_32.double() - costs) / costs).abs().max().item(),
            "gradient_difference": gradient_difference(loop_gradient_32),
        }
    }
    for solver in solvers:
        with torch.no_grad():
            result = solve_transport(wide.x, wide.y, *(wide.weights or ()), solver=solver)
        found[solver] = {
            "cost_difference": ((result.cost - costs) / costs).abs().max().item(),
            "gradient_difference": gradient_difference(run_ours(problem, solver)),
            "gap_over_cost": (result.gap / result.cost).max().item(),
            "solver": result.solver,
        }
    return found


def measure_case(family: str, batch: int, solvers: Sequence[str], arguments: argparse.Namespace) -> dict:
    """Measure one family and batch size: seconds, ratios and differences of the loop and each solver."""
    problem = make_problem(family, batch, tuple(arguments.shape), arguments.device)
    works = {LOOP: partial(run_loop, problem)}
    works |= {solver: partial(run_ours, problem, solver) for solver in solvers}
    title = f"transport, {family}, B = {batch}"
    figures = compare(time_in_turns(works, arguments.repeats, arguments.device, title), LOOP)
    differences = agreement(problem, solvers)
    return {
        "family": family,
        "batch": batch,
        "figures": {name: own | differences[name] for name, own in figures.items()},
    }


def requirements(cases: list[dict], times_faster: Mapping[str, float] = TIMES_FASTER) -> list[dict]:
    """Requirements on every exact solver for every case. Speed is required only of the solvers in `times_faster`."""
    found = []
    for case in cases:
        for name, own in case["figures"].items():
            if name not in EXACT_SOLVERS:
                continue
            where = f"{name}, {case['family']}, B = {case['batch']}"
            if name in times_faster:
                speed = own["times_faster"]["median"]
                found.append(must(f"{where}, times faster", speed, at_least=times_faster[name]))
            found.append(must(f"{where}, gap over cost", own["gap_over_cost"], at_most=GAP_OVER_COST))
            found.append(must(f"{where}, cost difference", own["cost_difference"], at_most=COST_DIFFERENCE))
            if case["family"] not in TIED_FAMILIES:
                difference = own["gradient_difference"]
                found.append(must(f"{where}, gradient difference", difference, at_most=GRADIENT_DIFFERENCE))
    return found


def table_rows(cases: list[dict]) -> list[list[str]]:
    """One row of `COLUMNS` per case and solver."""
    return [
        [
            *(case["family"], str(case["batch"])),
            f"{name} ({own['solver']})" if own.get("solver", name) != name else name,
            *(format_spread(own[column]) for column in ("seconds", "times_faster")),
            *(f"{own[column]:.1e}" for column in ("cost_difference", "gradient_difference")),
            f"{own['gap_over_cost']:.1e}" if "gap_over_cost" in own else "-",
        ]
        for case in cases
        for name, own in case["figures"].items()
    ]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "transport")
    add_batch_sizes(parser)
    parser.add_argument(
        "--families", choices=FAMILIES, nargs="+", default=["uniform"], help="families of problems (default: uniform)"
    )
    solvers = (*EXACT_SOLVERS, *APPROXIMATE_SOLVERS)
    parser.add_argument(
        "--solvers", choices=solvers, nargs="+", default=["exact"], help="solvers to compare (default: exact)"
    )
    return parse_benchmark(parser, words)


def main() -> None:
    arguments, load_before = parse_arguments(), load_average()
    cases = [
        measure_case(family, batch, arguments.solvers, arguments)
        for family in arguments.families
        for batch in arguments.batch_sizes
    ]
    musts = requirements(cases)
    settings = {name: getattr(arguments, name) for name in ("shape", "repeats", "device")}
    path = save(arguments.output, "transport", settings, cases, musts, load_before)
    show(TITLE, COLUMNS, table_rows(cases), musts)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
