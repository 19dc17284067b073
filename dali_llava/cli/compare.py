"""Test whether two systems differ on the same clips, for every metric that both were scored with.

A.json and B.json are files of `dali-llava score`, or `*.scores.json` in the folder OUT.captions of `dali-llava
evaluate`. Prints the scores, the difference A - B with its 95% interval (paired bootstrap over the clips), the effect
size (Cohen's d of the paired differences), and the two-sided p-value of a permutation test.

example:
  dali-llava compare ours.json baseline.json --out comparison.json
"""

import argparse
from pathlib import Path


COLUMNS = ("metric", "A", "B", "A - B", "95% interval", "effect size", "p-value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("a", type=Path, metavar="A.json", help="scores of a system")
    parser.add_argument("b", type=Path, metavar="B.json", help="scores of another system on the same clips")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file to write the comparison to")


def run(args: argparse.Namespace) -> int:
    """Compare the systems, print the table, and return 0."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from dali_llava.atomic import write_text
    from dali_llava.eval.score_files import compare_systems, read_scores

    if args.out is not None and args.out.is_dir():
        raise IsADirectoryError(f"{args.out}: is a folder; give --out a file name")
    a, b = read_scores(args.a), read_scores(args.b)
    tests = compare_systems(a, b)
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name, test in tests.items():
        low, high = test.interval
        effect = "-" if test.effect_size is None else f"{test.effect_size:+.3f}"
        scores = (f"{test.a:.4f}", f"{test.b:.4f}", f"{test.difference:+.4f}", f"{low:+.4f} to {high:+.4f}")
        table.add_row(name, *scores, effect, f"{test.p_value:.4g}")
    console = Console()
    # A log file has no width, and the default of 80 columns would cut the figures.
    console = console if console.is_terminal else Console(width=120)
    console.print(f"A: {args.a}, B: {args.b}, {len(a.ids)} clips", soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    if args.out is not None:
        record = {"a": str(args.a), "b": str(args.b), "n": len(a.ids)}
        record["metrics"] = {name: asdict(test) for name, test in tests.items()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(record, indent=2) + "\n")
    return 0
