"""Draw the figures of the paper from finished runs, and summarise runs with different seeds in one table.

For each RUN of `quickstart`, the command writes RUN/figures/mean_tokens.png, which shows mean audio and image tokens
with one panel per objective. If the run includes OT^Att, it also writes RUN/figures/attention.png, which shows the
attention over images. Runs with --esc10 are summarised but not drawn, because they do not store the folder of their
recordings. For several runs with different seeds, it prints a table of means with confidence intervals and writes the
table to --out.

examples:
  dali-llava figures runs/quickstart
  dali-llava figures runs/seed0 runs/seed1 runs/seed2 --out runs/summary.md
"""

import argparse
from pathlib import Path


SHOWN = 8  # clips in the attention figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dali-llava figures`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of quickstart")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="file for the table of several runs")


def run(args: argparse.Namespace) -> int:
    """Check that all runs are complete, draw their figures, and summarise them.

    Raises:
        FileNotFoundError: if the results or a checkpoint of a run are missing.
        ValueError: if two runs have the same seed.
    """
    from transformers import logging

    from dali_llava.atomic import write_text
    from dali_llava.eval.avworld.recordings import RECORDINGS_SPLIT
    from dali_llava.eval.results import load_results
    from dali_llava.eval.summary import summary_markdown

    logging.disable_progress_bar()
    results = [load_results(folder) for folder in args.runs]
    summary = summary_markdown(results) if len(results) > 1 else None
    methods = [list(dict.fromkeys(row.method for row in each.rows if row.stage == "aligned")) for each in results]
    for folder, aligned in zip(args.runs, methods, strict=True):
        for name in ("prefix", *(f"{method}-aligned" for method in aligned)):
            if not (folder / name).is_dir():
                raise FileNotFoundError(
                    f"{folder / name}: no such checkpoint; run `dali-llava quickstart` to create it"
                )
    for folder, aligned, result in zip(args.runs, methods, results, strict=True):
        if any(row.split == RECORDINGS_SPLIT for row in result.rows):
            print(f"not drawn: {folder} uses recordings; quickstart has drawn its mean tokens")
            continue
        print(f"written: {draw_mean_tokens(folder, aligned)}")
        if "ot_att" in aligned:
            print(f"written: {draw_attention(folder)}")
    if summary is not None:
        print(f"\n{summary}")
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.out, summary)
    return 0


def draw_mean_tokens(folder: Path, methods: list[str]) -> Path:
    """Draw the mean tokens of a run's checkpoints on `test`; returns the path of the figure."""
    from dali_llava.eval.captioner import load_captioner
    from dali_llava.eval.figures import plot_mean_tokens
    from dali_llava.eval.mean_tokens import mean_tokens
    from dali_llava.processing.corpora import load_corpus

    test = load_corpus("avworld", "test")
    audio = {method: mean_tokens(*load_captioner(folder / f"{method}-aligned"), test, "audio") for method in methods}
    image = mean_tokens(*load_captioner(folder / "prefix"), test, "image")
    return plot_mean_tokens(image, audio, folder / "figures" / "mean_tokens.png")


def draw_attention(folder: Path) -> Path:
    """Draw the attention of a run on `test` and print its mean by content; returns the path of the figure."""
    from dali_llava.eval.avworld.attention_maps import attention_by_content, image_attention
    from dali_llava.eval.captioner import load_captioner
    from dali_llava.eval.figures import plot_attention
    from dali_llava.processing.corpora import load_corpus
    from dali_llava.processing.corpora.rows import open_middle_frame
    from dali_llava.train.losses.attentive import load_alignment_attention

    aligned = folder / "ot_att-aligned"
    attention = load_alignment_attention(aligned)
    test = load_corpus("avworld", "test")
    maps = image_attention(*load_captioner(aligned), attention, test)
    means = attention_by_content(maps, test)
    print(
        f"attention of {folder} (uniform attention is 1): "
        + ", ".join(f"{kind} {mean:.2f}" for kind, mean in means.items())
    )
    shown = list(test.select(range(SHOWN)))
    captions = [row["captions"][0] for row in shown]
    path = folder / "figures" / "attention.png"
    return plot_attention([open_middle_frame(row) for row in shown], maps[:SHOWN], captions, path)
