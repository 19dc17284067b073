"""Shared functions of the benchmarks: alternating timings, peak memory, machine description, JSON records.

Speeds are reported as ratios within one run. The baseline and our implementation alternate, so that other load on the
machine affects both. Each round gives one ratio.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dali_llava.atomic import write_text
from dali_llava.eval.results import versions


RESULTS = Path(__file__).parent / "results"
# Audio tokens, image tokens and token width of the published model.
FULL_SHAPE = (512, 576, 1024)
_LIBRARIES = ("POT", "scipy")
_LOG_WIDTH = 140


def positive_int(text: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def benchmark_parser(description: str, name: str, device: str = "cpu") -> argparse.ArgumentParser:
    """Parser with the arguments shared by the benchmarks on token pairs. The default output is results/NAME.json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        type=positive_int,
        nargs=3,
        default=list(FULL_SHAPE),
        help=f"audio tokens, image tokens, width (default: {' '.join(map(str, FULL_SHAPE))})",
    )
    parser.add_argument("--repeats", type=positive_int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"device (default: {device})")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="output file")
    return parser


def add_batch_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the argument of benchmarks that run several batch sizes, one after another."""
    parser.add_argument(
        "--batch-sizes", type=positive_int, nargs="+", default=[8, 32], help="pairs per batch (default: 8 32)"
    )


def parse_benchmark(parser: argparse.ArgumentParser, words: list[str] | None = None) -> argparse.Namespace:
    """Parse `words` (default: the command line). Exits with code 2 if a GPU is requested and torch finds none."""
    import torch

    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return arguments


def alternate(
    works: dict[str, Callable[[], Any]],
    repeats: int,
    warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Time callables in alternation, A B C A B C ..., so that the durations of one round are comparable.

    Args:
        works: callables by name. On an accelerator, a callable must synchronize its device before it returns.
        repeats: number of timed rounds, at least 1.
        warm_ups: number of untimed rounds before them.
        clock: function that returns a monotonic time in seconds.
        tick: function called after each call of a callable, for a progress bar.

    Returns:
        `repeats` durations in seconds for each name.

    Raises:
        ValueError: if `repeats` is less than 1 or `warm_ups` is negative.
    """
    if repeats < 1 or warm_ups < 0:
        raise ValueError(f"repeats must be at least 1 and warm_ups at least 0, not {repeats} and {warm_ups}")
    seconds = {name: [] for name in works}
    for turn in range(warm_ups + repeats):
        for name, work in works.items():
            start = clock()
            work()
            end = clock()
            if turn >= warm_ups:
                seconds[name].append(end - start)
            tick()
    return seconds


def time_in_turns(
    works: dict[str, Callable[[], Any]], repeats: int, device: str, title: str
) -> dict[str, list[float]]:
    """Run `alternate` with a progress bar and synchronize the device after each call."""

    def waited(work):
        work()
        wait_for(device)

    calls = {name: partial(waited, work) for name, work in works.items()}
    with tqdm(total=len(works) * (repeats + 1), desc=title, leave=False) as bar:
        return alternate(calls, repeats, tick=bar.update)


def wait_for(device: str) -> None:
    """Block until the device has completed all queued work."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def spread(values: Iterable[float]) -> dict[str, float]:
    """Minimum, median and maximum of the values."""
    values = list(values)
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Spread of the seconds of each name, and of its speedup over the baseline in the same round.

    Raises:
        ValueError: if `seconds` has no timings of the baseline.
    """
    if baseline not in seconds:
        raise ValueError(f"no timings of the baseline {baseline!r}; available: {', '.join(map(repr, seconds))}")
    return {
        name: {
            "rounds": len(own),
            "seconds": spread(own),
            "times_faster": spread(theirs / ours for theirs, ours in zip(seconds[baseline], own, strict=True)),
        }
        for name, own in seconds.items()
    }


def peak_memory(
    work: Callable[[Any], Any], inputs: Callable[[], Any], small_inputs: Callable[[], Any], device: str = "cpu"
) -> int:
    """Peak memory of `work(inputs())` in bytes, without the memory of its inputs and of the loaded libraries.

    On a CPU, this is the difference between the peaks of two fresh processes, one of which does not run the work. Both
    first run the work on the small inputs, so that one-time initialization is excluded. All three callables must be
    picklable.
    """
    if device != "cpu":
        return _peak_on_cuda(work, inputs, small_inputs)
    # One task per process; "spawn" because a forked child would share the pages of the parent.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        without = pool.apply(_peak_of_process, (work, inputs, small_inputs, False))
        whole = pool.apply(_peak_of_process, (work, inputs, small_inputs, True))
    return whole - without


def _peak_of_process(work, inputs, small_inputs, with_work: bool) -> int:
    work(small_inputs())
    built = inputs()
    if with_work:
        work(built)
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss of getrusage survives exec and would start at the peak of the parent; VmHWM starts at 0.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _peak_on_cuda(work, inputs, small_inputs) -> int:
    import torch

    work(small_inputs())
    built = inputs()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(built)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine() -> dict[str, Any]:
    """CPU model, number of usable cores, RAM, torch threads and, if present, the GPU. Host names are not recorded."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def load_average() -> float:
    """Load average of the last minute, this process included."""
    return round(os.getloadavg()[0], 2)


def must(what: str, figure: float, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """Record of a requirement and the measured figure. A figure that is not finite does not meet the requirement."""
    met = math.isfinite(figure) and (at_least is None or figure >= at_least) and (at_most is None or figure <= at_most)
    bound = {"at_least": at_least} if at_most is None else {"at_most": at_most}
    return {"what": what, "figure": figure, **bound, "met": met}


def save(
    path: str | os.PathLike,
    benchmark: str,
    settings: dict[str, Any],
    cases: list[dict[str, Any]],
    musts: list[dict[str, Any]],
    load_before: float,
) -> Path:
    """Write the record of a run atomically and return its path. A missing folder is created.

    Raises:
        ValueError: if a figure is NaN or infinite.
    """
    libraries = {library: metadata.version(library) for library in _LIBRARIES}
    record = {
        "benchmark": benchmark,
        "settings": settings,
        "machine": machine(),
        "load_average": {"before": load_before, "after": load_average()},
        "versions": versions() | libraries,
        "cases": cases,
        "musts": musts,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return path


def show(title: str, columns: list[str], rows: list[list[str]], musts: list[dict[str, Any]]) -> None:
    """Print a table, followed by each requirement and its figure."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_LOG_WIDTH)
    table = Table(title=title)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for entry in musts:
        bound = f"at least {entry['at_least']:g}" if "at_least" in entry else f"at most {entry['at_most']:g}"
        verdict = "met" if entry["met"] else "MISSED"
        console.print(f"{verdict}: {entry['what']}: {entry['figure']:.3g}, {bound}", markup=False, highlight=False)


def format_spread(values: dict[str, float], digits: int = 3) -> str:
    """Format as "min / median / max"."""
    return " / ".join(f"{values[name]:.{digits}g}" for name in ("min", "median", "max"))
