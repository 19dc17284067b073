"""Measure the alignment objectives on a GPU at full size. step.py measures whole training steps.

The tokens are synthetic float32: 512 audio and 576 image tokens of width 1024. The benchmark requires one GPU with
80 GB of memory and at least ten CPU cores, which run the network simplex. It takes a few minutes:

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts mmd --batch 128
    python benchmarks/gpu.py --device cpu --batch 2 --shape 32 36 16 --repeats 1

The last command is a smoke test for the CPU, which is not expected to meet the speed requirements.

Parts:
    transport   the "certified" solver and the default "exact" solver compared with POT's emd2 in a loop over the
                pairs, forward and backward with respect to the audio tokens, as in transport.py; then the stages of
                "certified"
    mmd         MMDLoss compared with the same loss in a loop over the pairs, as in mmd.py
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import mmd
import torch
import transport
from measure import (
    FULL_SHAPE,
    benchmark_parser,
    format_spread,
    load_average,
    parse_benchmark,
    positive_int,
    save,
    show,
    spread,
    wait_for,
)
from tqdm import trange

from dali_llava.train.transport import certified, solve


FULL_BATCH = 256
TRANSPORT_TIMES_FASTER = {"certified": 20.0}
MMD_TIMES_FASTER = 5.0
MMD_MEMORY_SHARE = 0.1
# Lower bounds in seconds for an H200 at full size (4.3 TB/s, 790 TFLOP/s in bf16): one pass of the cost matrices
# through memory, 50 streamed Sinkhorn iterations, and MMD forward and backward (a range).
FLOORS = {"distances": 0.20e-3, "arcs": 7e-3, "mmd": (1.6e-3, 2.4e-3)}
# The functions in which "certified" spends its time. A function that no longer exists is left out of the table.
STAGES = {
    "distances": (solve, "expanded_costs"),
    "arcs": (certified, "likely_arcs"),
    "simplex": (certified, "_solve_restricted"),
}


def measure_transport(arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Time the loop, "certified" and "exact" in turn, then the stages of "certified", and print both tables."""
    batch = arguments.batch
    case = transport.measure_case("uniform", batch, ("certified", "exact"), arguments)
    problem = transport.make_problem("uniform", batch, tuple(arguments.shape), arguments.device)
    work = partial(transport.run_ours, problem, "certified")
    rounds = [
        stage_seconds(work, arguments.device) for _ in trange(arguments.repeats, desc="transport, stages", leave=False)
    ]
    stages = {name: spread(seconds[name] for seconds in rounds) for name in rounds[0]}
    floors = {name: FLOORS[name] for name in stages if name in FLOORS} if at_full_size(arguments) else {}
    case |= {"stages": stages, "floors": floors}
    musts = transport.requirements([case], TRANSPORT_TIMES_FASTER)
    show(transport.TITLE, transport.COLUMNS, transport.table_rows([case]), musts)
    columns = ["stage", "ms", "share of total", "H200 lower bound, ms"]
    show(f"Stages of certified, B = {batch} (min / median / max)", columns, stage_rows(stages, floors), [])
    return case, musts


def stage_seconds(
    work: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds that one call of `work` spends in each of `STAGES`, in everything else, and in total.

    The device is synchronized before and after each stage, so the total is slightly longer than without timing.
    """
    seconds = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        wait_for(device)
        start = clock()
        yield
        wait_for(device)
        seconds[name] = seconds.get(name, 0.0) + clock() - start

    def stand_in(name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            with timed(name):
                return function(*args, **kwargs)

        return run

    patches = [
        mock.patch.object(module, function, stand_in(name, getattr(module, function)))
        for name, (module, function) in STAGES.items()
        if hasattr(module, function)
    ]
    for patch in patches:
        patch.start()
    try:
        with timed("whole"):
            work()
    finally:
        for patch in patches:
            patch.stop()
    whole = seconds.pop("whole")
    return seconds | {"rest": whole - sum(seconds.values()), "whole": whole}


def stage_rows(stages: dict[str, dict[str, float]], floors: dict[str, float]) -> list[list[str]]:
    """One row per stage: milliseconds, share of the total, lower bound."""
    whole = stages["whole"]["median"]
    return [
        [
            name,
            format_spread({key: 1e3 * value for key, value in own.items()}),
            f"{own['median'] / whole:.1%}",
            f"{1e3 * floors[name]:.2g}" if name in floors else "-",
        ]
        for name, own in stages.items()
    ]


def measure_mmd(arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Time the loop and MMDLoss in turn, measure their peak memory and errors, and print the table."""
    case = mmd.measure_case(arguments.batch, "gram", arguments)
    musts = mmd.requirements([case], MMD_TIMES_FASTER, MMD_MEMORY_SHARE)
    rows = mmd.table_rows([case])
    if at_full_size(arguments):
        case["floor"] = FLOORS["mmd"]
        floor = "{:.2g} to {:.2g}".format(*FLOORS["mmd"])
        rows.append([str(arguments.batch), "H200 lower bound", floor, *["-"] * (len(mmd.COLUMNS) - 3)])
    show(mmd.TITLE, mmd.COLUMNS, rows, musts)
    return case, musts


def at_full_size(arguments: argparse.Namespace) -> bool:
    """Return True if the lower bounds apply to this run."""
    return arguments.batch == FULL_BATCH and tuple(arguments.shape) == FULL_SHAPE


PARTS = {"transport": measure_transport, "mmd": measure_mmd}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "gpu", device="cuda")
    parser.add_argument(
        "--batch",
        type=positive_int,
        default=FULL_BATCH,
        help=f"pairs per batch (default: {FULL_BATCH})",
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run (default: all)")
    return parse_benchmark(parser, words)


def main(words: list[str] | None = None) -> None:
    arguments, load_before = parse_arguments(words), load_average()
    settings = {name: getattr(arguments, name) for name in ("batch", "shape", "repeats", "device")}
    cases, musts = [], []
    for part in dict.fromkeys(arguments.parts):
        try:
            case, found = PARTS[part](arguments)
        except torch.OutOfMemoryError as error:
            raise SystemExit(f"{part}: out of memory; lower --batch. {error}") from error
        cases.append({"part": part, **case})
        musts += found
        # Save after each part, because a later part may fail.
        path = save(arguments.output, "gpu", settings, cases, musts, load_before)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
