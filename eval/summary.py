"""A table of means and confidence intervals over runs of the same pipeline with different seeds."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t

from .results import Results, Row, markdown_table, shown_metrics


LEVEL = 0.95  # confidence level of the intervals


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The mean, and half the width of its confidence interval (Student's t), which is NaN for a single value."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    half = t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def summary_markdown(runs: Sequence[Results]) -> str:
    """Markdown tables with the mean and interval of each system, and the number of runs in which each claim holds.

    Args:
        runs: results of the same systems with different seeds.

    Raises:
        ValueError: there are no runs, two runs have the same seed, or the runs contain different systems.
    """
    if not runs:
        raise ValueError("no runs to summarize")
    tables = [{_system(row): row for row in run.rows} for run in runs]
    seeds = [sorted({row.seed for row in run.rows}) for run in runs]
    if len({tuple(each) for each in seeds}) < len(seeds):
        raise ValueError(f"two runs have the same seed (seeds {seeds}); give runs with different seeds")
    for number, table in enumerate(tables):
        if table.keys() != tables[0].keys():
            odd = sorted(table.keys() ^ tables[0].keys())[0]
            raise ValueError(f"run {number + 1} has different systems from the first run, for example {' '.join(odd)}")
    minutes = ", ".join(f"{run.seconds / 60:.1f}" for run in runs)
    lines = [
        f"# Results on {runs[0].dataset}, {len(runs)} seeds",
        "",
        f"Seeds {', '.join(str(seed) for each in seeds for seed in each)}; mean ± half of the {LEVEL:.0%} interval "
        f"(Student's t over the seeds). {minutes} minutes.",
    ]
    for split in dict.fromkeys(row.split for row in runs[0].rows):
        systems = [system for system in tables[0] if system[-1] == split]
        shown = shown_metrics(table[system] for system in systems for table in tables)
        cells = [
            [*system[:-1], *(format_interval([table[system].metrics[name] for table in tables]) for name in shown)]
            for system in systems
        ]
        lines += ["", f"## {split}", "", *markdown_table(["method", "stage", "modality", *shown], cells)]
    claims = [{claim.claim: claim for claim in run.claims} for run in runs]
    told = [text for text in claims[0] if all(text in each for each in claims)]
    if told:
        rows = []
        for text in told:
            holds = sum(each[text].verdict == "holds" for each in claims)
            rows.append([text, f"{holds} of {len(runs)}", "; ".join(each[text].measured for each in claims)])
        lines += ["", "## Claims", "", *markdown_table(["claim", "holds", "measured"], rows)]
    return "\n".join(lines) + "\n"


def _system(row: Row) -> tuple[str, str, str, str]:
    return row.method, row.stage, row.modality, row.split


def format_interval(values: Sequence[float | None]) -> str:
    """The mean and half the width of its interval, the mean alone for one value, and a dash if a value is None."""
    if any(value is None for value in values):
        return "-"
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"
