"""Compare the speed and peak memory of MMDLoss with those of the same loss written as a loop over the pairs.

Both run forward and backward with respect to the audio tokens. The tokens are synthetic float32: 512 audio and 576
image tokens of width 1024. Errors are relative to the loop in float64. The benchmark takes about two minutes on two
cores and 6 GB of memory:

    python benchmarks/mmd.py
    python benchmarks/mmd.py --batch-sizes 8 --repeats 3 --device cuda --baseline broadcast
"""

import argparse
from functools import partial

import torch
from measure import (
    add_batch_sizes,
    benchmark_parser,
    compare,
    format_spread,
    load_average,
    must,
    parse_benchmark,
    peak_memory,
    save,
    show,
    time_in_turns,
)
from tqdm import tqdm

from dali_llava.train.losses import MMDLoss


TIMES_FASTER = 2.0
MEMORY_SHARE = 0.5
TITLE = "MMD, forward and backward (min / median / max)"
COLUMNS = ["B", "loss", "seconds", "times faster", "peak MiB", "value error", "gradient error"]


def make_tokens(batch: int, shape: tuple[int, int, int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio tokens (B, N, D), which require a gradient, and image tokens (B, M, D)."""
    audio_tokens, image_tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(batch, audio_tokens, width, generator=generator)
    image = torch.randn(batch, image_tokens, width, generator=generator).mul_(0.9).add_(0.1)
    return audio.to(device).requires_grad_(), image.to(device)


def squared_distances_by_product(tokens: torch.Tensor) -> torch.Tensor:
    """Squared distances (L, L) from one matrix product."""
    return torch.cdist(tokens, tokens).square()


def squared_distances_by_difference(tokens: torch.Tensor) -> torch.Tensor:
    """Squared distances (L, L) from all L x L x D differences."""
    return (tokens[None] - tokens[:, None]).square().sum(dim=2)


DISTANCES = {"gram": squared_distances_by_product, "broadcast": squared_distances_by_difference}


def loop_loss(audio: torch.Tensor, image: torch.Tensor, distances: str) -> torch.Tensor:
    """Baseline: for each pair, one kernel matrix over the concatenated tokens; gradients by autograd."""
    values = []
    for x, y in zip(audio, image, strict=True):
        squared = DISTANCES[distances](torch.cat((x, y)))
        count = len(squared)
        bandwidth = squared.detach().sum() / (count * (count - 1))
        kernel = sum(torch.exp(-squared / (multiple * bandwidth)) for multiple in (0.25, 0.5, 1.0, 2.0, 4.0))
        n = len(x)
        values.append(kernel[:n, :n].mean() - 2 * kernel[:n, n:].mean() + kernel[n:, n:].mean())
    return torch.stack(values).mean()


def run_loop(tokens: tuple[torch.Tensor, torch.Tensor], distances: str) -> tuple[float, torch.Tensor]:
    """Value of the loop's loss and its gradient (B, N, D)."""
    loss = loop_loss(*tokens, distances)
    (gradient,) = torch.autograd.grad(loss, tokens[0])
    return loss.item(), gradient


def run_ours(tokens: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Value of MMDLoss and its gradient (B, N, D)."""
    loss = MMDLoss()(*tokens).loss
    (gradient,) = torch.autograd.grad(loss, tokens[0])
    return loss.item(), gradient


def agreement(tokens: tuple[torch.Tensor, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Relative errors of both in float32 against the loop in float64. The gradient error is relative to the largest
    gradient entry."""
    wide = tuple(part.detach().double() for part in tokens)
    value, gradient = run_loop((wide[0].requires_grad_(), wide[1]), "gram")
    found = {}
    for name, run in (("loop", partial(run_loop, distances="gram")), ("MMDLoss", run_ours)):
        own_value, own_gradient = run(tokens)
        found[name] = {
            "value_relative_error": abs(own_value - value) / abs(value),
            "gradient_relative_error": ((own_gradient.double() - gradient).abs().max() / gradient.abs().max()).item(),
        }
    return found


def measure_case(batch: int, baseline: str, arguments: argparse.Namespace) -> dict:
    """Measure one batch size: seconds, ratios, peak memory and errors of both."""
    shape, device = tuple(arguments.shape), arguments.device
    tokens = make_tokens(batch, shape, device)
    works = {"loop": partial(run_loop, distances=baseline), "MMDLoss": run_ours}
    calls = {name: partial(work, tokens) for name, work in works.items()}
    figures = compare(time_in_turns(calls, arguments.repeats, device, f"MMD, B = {batch}, timing"), "loop")
    # The first pairs are representative, and float64 is slow.
    errors = agreement((tokens[0].detach()[:8].requires_grad_(), tokens[1][:8]))
    inputs, small = partial(make_tokens, batch, shape, device), partial(make_tokens, 1, (8, 8, 8), device)
    for name, work in tqdm(works.items(), desc=f"MMD, B = {batch}, memory", leave=False):
        figures[name] |= {"peak_bytes": peak_memory(work, inputs, small, device), **errors[name]}
    # A tiny batch may fit into pages that the process already holds.
    share = figures["MMDLoss"]["peak_bytes"] / max(1, figures["loop"]["peak_bytes"])
    return {"batch": batch, "figures": figures, "memory_share": share}


def requirements(
    cases: list[dict], times_faster: float = TIMES_FASTER, memory_share: float = MEMORY_SHARE
) -> list[dict]:
    """Requirements on the speed and memory of MMDLoss relative to the loop, for every case."""
    found = []
    for case in cases:
        where, speed = f"MMD, B = {case['batch']}", case["figures"]["MMDLoss"]["times_faster"]["median"]
        found.append(must(f"{where}, times faster than the loop", speed, at_least=times_faster))
        found.append(must(f"{where}, share of the loop's peak memory", case["memory_share"], at_most=memory_share))
    return found


def table_rows(cases: list[dict]) -> list[list[str]]:
    """One row of `COLUMNS` per case and loss."""
    return [
        [
            *(str(case["batch"]), name, format_spread(own["seconds"]), format_spread(own["times_faster"])),
            f"{own['peak_bytes'] / 2**20:.0f}",
            *(f"{own[column]:.1e}" for column in ("value_relative_error", "gradient_relative_error")),
        ]
        for case in cases
        for name, own in case["figures"].items()
    ]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "mmd")
    add_batch_sizes(parser)
    parser.add_argument(
        "--baseline", choices=sorted(DISTANCES), default="gram", help="how the loop computes distances"
    )
    return parse_benchmark(parser, words)


def main() -> None:
    arguments, load_before = parse_arguments(), load_average()
    cases = [measure_case(batch, arguments.baseline, arguments) for batch in arguments.batch_sizes]
    musts = requirements(cases)
    settings = {name: getattr(arguments, name) for name in ("shape", "baseline", "repeats", "device")}
    path = save(arguments.output, "mmd", settings, cases, musts, load_before)
    show(TITLE, COLUMNS, table_rows(cases), musts)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
