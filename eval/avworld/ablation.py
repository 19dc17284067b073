"""The ablations of LAVCap on AVWorld: their rows, the published figures, and a table with paired differences."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from datasets import Dataset

from dali_llava.atomic import write_text

from ..caption_metrics import CaptionScorer
from ..captioner import load_captioner
from ..evaluation import System, caption_split, score_split
from ..results import Row, markdown_table, shown_metrics, versions
from ..runner import CaptionRunner
from ..summary import LEVEL, interval
from .source_metrics import class_phrases


BATCH_SIZE = 100
MAX_NEW_TOKENS = 32
DATA = Path(__file__).with_name("lavcap_ablation.json")
PUBLISHED = ("meteor", "cider_d", "spice", "spider")
DIFFERENCE = "cider_d"  # metric whose differences are shown


@dataclass(frozen=True)
class Line:
    """A line of a table: its row, its label, and the figures of the paper as fractions, by metric."""

    row: str
    label: str
    published: dict[str, float]


@dataclass(frozen=True)
class Table:
    """A table of the paper, or of this project: its number and title, the row to compare with, and its lines."""

    name: str
    title: str
    baseline: str
    lines: tuple[Line, ...]


@cache
def ablation_rows() -> dict[str, dict]:
    """The arguments of `train/lavcap.py` in which each row differs from its configuration, by the name of the row."""
    return json.loads(DATA.read_text(encoding="utf-8"))["rows"]


@cache
def ablation_tables() -> tuple[Table, ...]:
    """The tables II, III, IV and VI of the paper, and one of this project."""
    found = json.loads(DATA.read_text(encoding="utf-8"))["tables"]
    return tuple(Table(**table | {"lines": tuple(Line(**line) for line in table["lines"])}) for table in found)


def write_row(path: Path, row: Row, arguments: Mapping) -> None:
    """Write the result of a row, and the arguments of its training, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"arguments": arguments, "row": vars(row)}, indent=2) + "\n")


def read_row(path: Path, arguments: Mapping) -> Row | None:
    """
    Return the result that `write_row` wrote, or None if there is none.

    Raises:
        ValueError: the file is damaged, or its row was trained with other arguments.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        row, trained = Row(**content["row"]), content["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the result of a row ({error}); delete it to train the row again.") from error
    if trained != arguments:
        raise ValueError(f"{path}: the row was trained with other arguments; delete it, or choose another folder.")
    return row


def score_row(name: str, model: Path, seed: int, rows: Dataset, split: str, out: Path, scorer: CaptionScorer) -> Row:
    """
    Caption a split with the model of a row, with its own prompt and beams, and score the captions.

    Args:
        name: name of the row.
        model: folder of the model.
        seed: seed of its training.
        rows, split: the split and its name.
        out: folder of the captions.
        scorer: the scorer.
    """
    captioner, processor = load_captioner(str(model))
    modality = "audio" if ablation_rows()[name].get("modalities") == ["audio"] else "audiovisual"
    system = System(name, "supervised", modality, processor.sound_prompt)
    runner = CaptionRunner(captioner, processor, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS)
    captioned = caption_split(runner, rows, system, split, out)
    (row,) = score_split(scorer, rows, [captioned], seed, class_phrases())
    return row


@dataclass
class Measured:
    """
    A line of a table with its figures.

    Attributes:
        line: the line.
        seeds: seeds of the row, in ascending order.
        metrics: mean and half of the interval by metric, NaN for a single seed.
        differences: the same for the differences from the baseline, on the seeds of both rows.
    """

    line: Line
    seeds: list[int]
    metrics: dict[str, tuple[float, float]]
    differences: dict[str, tuple[float, float]] = field(default_factory=dict)


def measure(table: Table, results: Iterable[Row]) -> list[Measured]:
    """
    The figures of the lines of a table that have results.

    The differences are paired: a row and the baseline with the same seed have the same base model.
    """
    by_row: dict[str, dict[int, Row]] = {}
    for row in results:
        by_row.setdefault(row.method, {})[row.seed] = row
    found = []
    for line in table.lines:
        if line.row not in by_row:
            continue
        own, other = by_row[line.row], by_row.get(table.baseline, {})
        metrics = {name: interval([row.metrics[name] for row in own.values()]) for name in shown_metrics(own.values())}
        measured = Measured(line, sorted(own), metrics)
        common = sorted(own.keys() & other.keys())
        if line.row != table.baseline and common:
            measured.differences = {
                name: interval([own[seed].metrics[name] - other[seed].metrics[name] for seed in common])
                for name in metrics
            }
        found.append(measured)
    return found


def write_ablation(out: Path, results: Iterable[Row], split: str, seconds: float) -> tuple[Path, Path]:
    """
    Write ablation.json (rows, tables, versions) and ablation.md (tables) to `out`, each atomically. Returns the paths.

    Args:
        out: output folder.
        results: the rows.
        split: the split that was scored.
        seconds: wall-clock time of the run.
    """
    results, (data, page) = list(results), (out / "ablation.json", out / "ablation.md")
    content = {
        "split": split,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "rows": [vars(row) for row in results],
        "tables": tables_as_json(results),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(data, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(page, to_markdown(results, split))
    return data, page


def tables_as_json(results: Iterable[Row]) -> list[dict]:
    """The tables with the figures of `measure`, as JSON values; NaN becomes null."""

    def values(figures: Mapping[str, tuple[float, float]]) -> dict[str, dict]:
        return {
            name: {"mean": mean, "half_interval": None if math.isnan(half) else half}
            for name, (mean, half) in figures.items()
        }

    results = list(results)
    return [
        {
            "table": table.name,
            "title": table.title,
            "baseline": table.baseline,
            "lines": [
                {
                    "row": one.line.row,
                    "label": one.line.label,
                    "seeds": one.seeds,
                    "published": one.line.published,
                    "measured": values(one.metrics),
                    "differences": values(one.differences),
                }
                for one in measure(table, results)
            ],
        }
        for table in ablation_tables()
    ]


def to_markdown(results: Iterable[Row], split: str) -> str:
    """The tables as Markdown: our figures beside those of the paper, and the paired differences in CIDEr-D."""
    results = list(results)
    lines = [
        "# Ablations of LAVCap on AVWorld",
        "",
        f"Split {split}; mean ± half of the {LEVEL:.0%} interval (Student's t over the seeds). The paper's figures, "
        "on AudioCaps, are CIDEr where this table says CIDEr-D. Differences from the baseline are paired by seed.",
    ]
    for table in ablation_tables():
        found = measure(table, results)
        if not found:
            continue
        shown = [name for name in (*PUBLISHED, "sound_recall") if any(name in one.metrics for one in found)]
        header = ["row", *(f"{name}, paper" for name in PUBLISHED), *shown, f"{DIFFERENCE}, difference"]
        cells = [
            [
                one.line.label,
                *(f"{one.line.published[name]:.3f}" if name in one.line.published else "-" for name in PUBLISHED),
                *(_cell(one.metrics.get(name)) for name in shown),
                "baseline" if one.line.row == table.baseline else _cell(one.differences.get(DIFFERENCE), sign="+"),
            ]
            for one in found
        ]
        lines += ["", f"## {'Table ' if table.name.isupper() else ''}{table.name}: {table.title}", ""]
        lines += markdown_table(header, cells)
    return "\n".join(lines) + "\n"


def _cell(figure: tuple[float, float] | None, sign: str = "") -> str:
    if figure is None:
        return "-"
    mean, half = figure
    return f"{mean:{sign}.3f}" if math.isnan(half) else f"{mean:{sign}.3f} ± {half:.3f}"
