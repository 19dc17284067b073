"""
The page docs/leaderboard.md: our results on AVWorld beside published results on real corpora.

    python -m dali_llava.eval.leaderboard docs/data/*.json --out docs/leaderboard.md

The published figures and their sources are in `published.json`. Our figures are means over the seeds of the files.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dali_llava.atomic import write_text

from .results import Row, markdown_table
from .summary import LEVEL, format_interval


PUBLISHED = Path(__file__).with_name("published.json")
OURS = {"meteor": "METEOR", "cider_d": "CIDEr-D"}
THEIRS = {"meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr", "spice": "SPICE", "spider": "SPIDEr"}
INTRODUCTION = f"""\
<!-- Written by `python -m dali_llava.eval.leaderboard`. Edit eval/published.json or eval/leaderboard.py instead. -->

# Leaderboard

The same methods, as this project measures them on AVWorld and as their papers report them on real corpora. Ours are
means over seeds, ± half of the {LEVEL:.0%} interval (Student's t). The captioner is the same for all seeds, so the
intervals leave out its variation. A dash is a figure that was not measured or not published. [Results](results.md) and
[LAVCap](lavcap.md) describe our runs.

**Comparable:** the order of the methods within a column, except that of the contrastive baseline in ours: its
temperature is the one of DALI's reference code and was not tuned. A tuned one scores higher on AVWorld.

**Not comparable:**

- Our columns with those of the papers. AVWorld's captions follow a grammar with few words, so its scores are high,
  and its captioner has 1.1 million parameters. No model at full size was trained here.
- Zero-shot with supervised systems.
- Small differences between papers: some clips are no longer on YouTube, so the test sets differ.

The names of DALI's objectives were missing from its tables in the version that was read. Its rows are named by the
text of the paper and by the order of the tables.
"""


def leaderboard_markdown(rows: Iterable[Row]) -> str:
    """
    The content of the page.

    Args:
        rows: our rows, of any number of seeds. Rows without a published counterpart are left out.
    """
    measured: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        measured.setdefault((row.method, row.stage, row.modality, row.split), []).append(row)
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    lines = [INTRODUCTION]
    for table in published["tables"]:
        split, corpus = table["split"], table["corpus"]
        given = {name for row in table["rows"] for name in row["metrics"]}
        theirs = {name: label for name, label in THEIRS.items() if name in given}
        header = ["system", "training", "input"]
        header += [f"{label}, AVWorld" for label in OURS.values()] + [
            f"{label}, {corpus}" for label in theirs.values()
        ]
        cells = []
        for row in table["rows"]:
            ours = measured.get((*row["ours"], split), []) if "ours" in row else []
            figures = [format_interval([one.metrics[name] for one in ours]) if ours else "-" for name in OURS]
            figures += [str(row["metrics"].get(name, "-")) for name in theirs]
            url = published["sources"][row["source"]]["url"]
            cells.append([f"[{row['system']}]({url})", row["training"], row["input"], *figures])
        lines += [f"## {table['title']}", "", f"Split `{split}` of AVWorld, test split of {corpus}.", ""]
        lines += [*markdown_table(header, cells), ""]
    lines += ["## Sources", ""]
    lines += [f"- [{each['name']}]({each['url']}): {each['text']}" for each in published["sources"].values()]
    return "\n".join(lines) + "\n"


def read_rows(path: str | os.PathLike) -> list[Row]:
    """
    The rows of a results file, or of `ablation.json`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has no rows of results.
    """
    try:
        return [Row(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no rows of results ({error}); give a results.json or an ablation.json") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write the leaderboard from results files.")
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help="results.json or ablation.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md", help="page to write")
    args = parser.parse_args(argv)
    write_text(args.out, leaderboard_markdown([row for path in args.results for row in read_rows(path)]))


if __name__ == "__main__":
    main()
