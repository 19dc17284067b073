"""What the benchmarks share: alternate timings, peak memory, the machine, and a record of it all as JSON.

A figure here is a ratio within one run. Baseline and ours take turns, so that whatever else loads the machine loads
both, and each round gives one ratio.
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

from dali_llava.eval.results import versions, write_text


RESULTS = Path(__file__).parent / "results"
# Audio tokens, image tokens and their width, of the published model.
FULL_SHAPE = (512, 576, 1024)
_LIBRARIES = ("POT", "scipy")
_LOG_WIDTH = 140


def positive_int(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def benchmark_parser(description: str, name: str, device: str = "cpu") -> argparse.ArgumentParser:
    """A parser with the arguments of every benchmark of token pairs; the record goes to results/NAME.json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        type=positive_int,
        nargs=3,
        default=list(FULL_SHAPE),
        help=f"audio tokens, image tokens, width (default: {' '.join(map(str, FULL_SHAPE))})",
    )
    parser.add_argument("--repeats", type=positive_int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"(default: {device})")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="record of the run")
    return parser


def add_batch_sizes(parser: argparse.ArgumentParser) -> None:
    """The argument of a benchmark that takes several batch sizes, one after the other."""
    parser.add_argument(
        "--batch-sizes", type=positive_int, nargs="+", default=[8, 32], help="pairs a batch (default: 8 32)"
    )


def parse_benchmark(parser: argparse.ArgumentParser, words: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments, or those of `words`; exits with 2 where torch sees no GPU and one is asked for."""
    import torch

    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return arguments


def alternate(
    works: dict[str, Callable[[], Any]],
    repeats: int,
    warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Times callables in turn, A B C A B C ...: round i of one stands beside round i of another.

    Args:
        works: what to time, by name. On an accelerator a callable must wait for its own work.
        repeats: timed rounds, at least 1.
        warm_ups: rounds before them that are not timed.
        clock: seconds, growing.
        tick: called after each call of a work, for a progress bar.

    Returns:
        `repeats` durations in seconds for each name.
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
    """`alternate` behind a progress bar, each work timed until its device is done."""

    def waited(work):
        work()
        wait_for(device)

    calls = {name: partial(waited, work) for name, work in works.items()}
    with tqdm(total=len(works) * (repeats + 1), desc=title, leave=False) as bar:
        return alternate(calls, repeats, tick=bar.update)


def wait_for(device: str) -> None:
    """Returns when the device has done all it was given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def spread(values: Iterable[float]) -> dict[str, float]:
    """min, median and max."""
    values = list(values)
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Spread of each name's seconds, and of how many times faster than the baseline it was in the same round."""
    if baseline not in seconds:
        raise ValueError(f"no timings of the baseline {baseline!r}; there are {', '.join(map(repr, seconds))}")
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
    """Bytes that `work(inputs())` takes at its peak beyond what its inputs and the loaded libraries do.

    On a CPU it is the difference between the peaks of two fresh processes, of which one stops short of the work. Both
    run the work on the small inputs first, so that what is loaded or set up once counts for neither. All three
    callables must survive pickling.
    """
    if device != "cpu":
        return _peak_on_cuda(work, inputs, small_inputs)
    # A pool of one task a process; "spawn" because a forked child would share the parent's pages.
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
        # getrusage's ru_maxrss survives exec, and would start at the parent's peak; VmHWM starts at 0.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # absent on Windows

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
    """CPU model, cores this process may use, RAM, torch's threads, and the GPU if there is one. No host names."""
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
    """Processes that ran or waited for a core, over the last minute; this one counts."""
    return round(os.getloadavg()[0], 2)


def must(what: str, figure: float, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """A requirement beside the figure measured; a figure that is no number does not meet it."""
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
    """Writes a record of the run, whole or not at all; the folder is made if missing."""
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
    """Prints a table, and under it each requirement with its figure."""
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
    """min / median / max in one cell."""
    return " / ".join(f"{values[name]:.{digits}g}" for name in ("min", "median", "max"))
