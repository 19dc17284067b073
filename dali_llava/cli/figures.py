"""Draw the paper's figures from finished runs, and put several seeds into one table.

For each RUN of `quickstart`, writes RUN/figures/mean_tokens.png: mean audio tokens among mean image tokens, a panel an
objective. Of several runs, a seed each, prints the means with their intervals and writes them to --out.

examples:
  dali-llava figures runs/quickstart
  dali-llava figures runs/seed0 runs/seed1 runs/seed2 --out runs/summary.md
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dali-llava figures`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that quickstart wrote")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="where to write the table of several runs")


def run(args: argparse.Namespace) -> int:
    """Check that all runs are there, then draw, then summarise."""
    from dali_llava.eval.results import load_results, write_text
    from dali_llava.eval.summary import summary_markdown

    results = [load_results(folder) for folder in args.runs]
    summary = summary_markdown(results) if len(results) > 1 else None
    for folder, result in zip(args.runs, results, strict=True):
        methods = dict.fromkeys(row.method for row in result.rows if row.stage == "aligned")
        print(f"written: {draw(folder, list(methods))}")
    if summary is not None:
        print(f"\n{summary}")
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.out, summary)
    return 0


def draw(folder: Path, methods: list[str]) -> Path:
    """The figure of mean tokens of a run, from its checkpoints, on `test`."""
    from transformers import logging

    from dali_llava.eval.figures import plot_mean_tokens
    from dali_llava.eval.modality_gap import mean_tokens
    from dali_llava.modeling import LlavaAudioForConditionalGeneration
    from dali_llava.processing import LlavaAudioProcessor
    from dali_llava.processing.corpora import load_corpus

    logging.disable_progress_bar()
    for name in ("prefix", *(f"{method}-aligned" for method in methods)):
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name}: no such checkpoint; `dali-llava quickstart` writes it")
    processor = LlavaAudioProcessor.from_pretrained(folder / "prefix")
    test = load_corpus("avworld", "test")

    def tokens(name: str, modality: str):
        return mean_tokens(
            LlavaAudioForConditionalGeneration.from_pretrained(folder / name), processor, test, modality
        )

    audio = {method: tokens(f"{method}-aligned", "audio") for method in methods}
    return plot_mean_tokens(tokens("prefix", "image"), audio, folder / "figures" / "mean_tokens.png")
