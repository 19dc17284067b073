"""The results of a run: rows of metrics and claims, in results.json and results.md."""

import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dali_llava.atomic import write_text
from dali_llava.eval.avworld.source_metrics import SOURCE_METRICS

from .caption_metrics import CAPTION_METRICS, FURTHER_METRICS


METRICS = (*CAPTION_METRICS, *FURTHER_METRICS, *SOURCE_METRICS)
STAGES = ("prompt", "prefix", "aligned", "distilled", "supervised")
MODALITIES = ("audio", "image", "audiovisual")
VERDICTS = ("holds", "fails", "undecided")
NOT_MEASURED = "not measured for this row"

_LIBRARIES = ("dali-llava", "torch", "torchaudio", "torchvision", "transformers", "datasets", "accelerate", "numpy")
_LOG_WIDTH = 200
_COLUMNS = ("method", "stage", "modality", "split", "seed", "n")


@dataclass
class Row:
    """One system on one split.

    Args:
        method: name of the method, such as image_only, contrastive, mmd, ot, ot_att or lavcap.
        stage: one of ``STAGES``; "prompt" is without prefix.
        modality: input of the system, one of ``MODALITIES``.
        split: split of the data set.
        seed: seed of the run.
        n: number of clips.
        metrics: values by name from ``METRICS``. A metric that did not run is None and has a reason. A metric that is
            not given becomes None with the reason "not measured for this row".
        reason: reasons by metric for None, and remarks, such as on the Python tokenizer.
        intervals: 95% intervals [low, high] over the clips by metric; see :func:`dali_llava.eval.bootstrap.intervals`.

    Raises:
        ValueError: a stage, modality or metric is unknown, a metric is not finite, or a metric is None without reason.
    """

    method: str
    stage: str
    modality: str
    split: str
    seed: int
    n: int
    metrics: dict[str, float | None]
    reason: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _choose("stage", self.stage, STAGES)
        _choose("modality", self.modality, MODALITIES)
        for name in (*self.metrics, *self.intervals):
            _choose("metric", name, METRICS)
        for name, value in self.metrics.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} of {self.method} is {value}: give a number, or None with a reason")
            if value is None and not self.reason.get(name):
                raise ValueError(f"{name} of {self.method} is None without a reason: add the reason")
        self.reason = {name: NOT_MEASURED for name in METRICS if name not in self.metrics} | self.reason
        self.metrics = {name: self.metrics.get(name) for name in METRICS}


@dataclass
class Claim:
    """A statement about a method, whether it holds in this run, and the measured figures.

    Raises:
        ValueError: the verdict is not one of ``VERDICTS``.
    """

    claim: str
    verdict: str
    measured: str

    def __post_init__(self) -> None:
        _choose("verdict", self.verdict, VERDICTS)


@dataclass
class Results:
    """All results of a run.

    Args:
        dataset: name of the data set.
        seconds: wall-clock time of the run.
        versions: software and machine; see :func:`versions`.
        rows: one row per system and split.
        claims: the claims that were checked.
    """

    dataset: str
    seconds: float
    versions: dict[str, str | int]
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The content of results.json."""
        return {
            "dataset": self.dataset,
            "seconds": round(self.seconds, 1),
            "versions": self.versions,
            "rows": [vars(row) for row in self.rows],
            "claims": [vars(claim) for claim in self.claims],
        }


def _choose(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(allowed)}")


def versions() -> dict[str, str | int]:
    """Versions of Python and of the libraries that affect the results, and the machine."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found | {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count() or 1}


def write_results(results: Results, directory: str | os.PathLike) -> tuple[Path, Path]:
    """Writes results.json and results.md, each atomically.

    Args:
        results: the results to write.
        directory: output folder, created if missing.

    Returns:
        The two paths.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    paths = folder / "results.json", folder / "results.md"
    for path, content in zip(paths, (text, to_markdown(results)), strict=True):
        write_text(path, content)
    return paths


def load_results(path: str | os.PathLike) -> Results:
    """Reads results.json.

    Args:
        path: the file, or its directory.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a results file. The message names the file and the field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such results file; run `dali-llava quickstart` or `evaluate` first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in content.pop("rows")]
        claims = [Claim(**claim) for claim in content.pop("claims")]
        return Results(**content, rows=rows, claims=claims)
    except KeyError as error:
        raise ValueError(f"{path}: not a results file, {error.args[0]!r} is missing; write it again") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a results file ({error}); write it again") from error


def to_markdown(results: Results) -> str:
    """The content of results.md: a table of the rows, reasons for missing metrics, claims, and versions."""
    lines = [f"# Results on {results.dataset}", "", f"{results.seconds:.1f} seconds.", ""]
    if results.rows:
        lines += rows_table(results.rows)
        lines += ["", "Fractions in [0, 1], CIDEr-D in [0, 10]; a dash is a metric that did not run."]
        lines += ["", *reasons] if (reasons := reason_lines(results.rows)) else []
    if results.claims:
        cells = [[claim.claim, claim.verdict, claim.measured] for claim in results.claims]
        lines += ["", "## Claims", "", *markdown_table(["claim", "verdict", "measured"], cells)]
    lines += ["", "## Versions", "", *(f"- {name}: {value}" for name, value in results.versions.items())]
    return "\n".join(lines) + "\n"


def print_results(results: Results, console: Console | None = None) -> None:
    """Prints tables of the rows and claims, and reasons for missing metrics. The default console is stdout."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            # A log file has no width, and the default of 80 columns would fold every cell.
            console = Console(width=_LOG_WIDTH)
    if results.rows:
        shown = shown_metrics(results.rows)
        table = Table(title=f"{results.dataset}, {results.seconds:.0f} s")
        for name in (*_COLUMNS, *shown):
            # Figures must not be truncated, so cells are folded in a narrow terminal.
            table.add_column(name, justify="left" if name in _COLUMNS[:4] else "right", overflow="fold")
        for row in results.rows:
            table.add_row(*_cells(row, shown))
        console.print(table)
        for line in reason_lines(results.rows):
            console.print(line, markup=False, highlight=False)
    if results.claims:
        table = Table("claim", "verdict", "measured", title="claims")
        for claim in results.claims:
            table.add_row(claim.claim, claim.verdict, claim.measured)
        console.print(table)


def shown_metrics(rows: Iterable[Row]) -> list[str]:
    """Metrics that have a value in at least one row."""
    rows = list(rows)
    return [name for name in METRICS if any(row.metrics[name] is not None for row in rows)]


def _cells(row: Row, shown: Iterable[str]) -> list[str]:
    values = (row.metrics[name] for name in shown)
    return [str(getattr(row, name)) for name in _COLUMNS] + ["-" if v is None else f"{v:.3f}" for v in values]


def reason_lines(rows: Iterable[Row]) -> list[str]:
    """The lines of a Markdown list of the reasons for missing metrics and the remarks."""
    found = dict.fromkeys((name, text) for row in rows for name, text in row.reason.items() if text != NOT_MEASURED)
    return [f"- {name}: {text}" for name, text in found]


def rows_table(rows: Iterable[Row]) -> list[str]:
    """The lines of a Markdown table of rows, with the metrics that have a value in at least one of them."""
    rows = list(rows)
    shown = shown_metrics(rows)
    return markdown_table([*_COLUMNS, *shown], [_cells(row, shown) for row in rows])


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a Markdown table; bars inside cells are escaped."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(cells) for cells in rows)]
