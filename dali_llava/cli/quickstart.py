"""Run the whole pipeline on the built-in AVWorld: captioner, prefix, alignment, distillation, evaluation.

All stages run in minutes on two cores, with the same classes and scripts as the full-size model. The captioner is
trained once and cached. The command writes results.json, results.md, all captions, the figure of mean tokens and the
checkpoint of each stage to OUT, and the final captioner to OUT/model.

examples:
  dali-llava quickstart
  dali-llava quickstart --methods all --out runs/all
  dali-llava quickstart --out runs/seed1 --seed 1 --methods contrastive,ot_att
  dali-llava quickstart --esc10 ESC-10 --out runs/esc10
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from .merge import merge_checkpoint


ALL_METHODS = ("contrastive", "mmd", "ot", "ot_att")  # those that the paper compares
DEFAULT_METHODS = "mmd"
RECORDINGS_METHODS = "ot_att"
RECORDINGS_CLIPS = 18000  # clips for the alignment with recordings: more crops of each recording
SHOWN_SYSTEMS = (("aligned", "audio"), ("distilled", "audio"), ("distilled", "audiovisual"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dali-llava quickstart`."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="output folder; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the stages; default: %(default)s")
    parser.add_argument(
        "--methods",
        metavar="all|NAME,...",
        help="alignment objectives, run one after another; OUT/model is the model of the last one; "
        f"default: {DEFAULT_METHODS}, or {RECORDINGS_METHODS} with --esc10",
    )
    parser.add_argument(
        "--esc10",
        type=Path,
        metavar="DIR",
        help="folder of ESC-10: real recordings replace the synthesisers of ten classes, "
        "folds 1 to 3 for training and fold 4 for testing",
    )


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, and print and save the results. A claim that does not hold is not an error.

    Raises:
        ValueError: if a method is unknown or given twice, or the seed is negative.
        FileNotFoundError, ValueError: if the folder of ESC-10 is missing or incomplete.
    """
    from dali_llava.train.losses import LOSSES

    wanted = args.methods
    if wanted is None:
        wanted = DEFAULT_METHODS if args.esc10 is None else RECORDINGS_METHODS
    methods = list(ALL_METHODS) if wanted == "all" else wanted.split(",")
    for method in methods:
        if method not in LOSSES:
            raise ValueError(f"--methods: unknown method '{method}'; choose from all, {', '.join(LOSSES)}.")
    if len(set(methods)) < len(methods):
        raise ValueError(f"--methods {wanted}: duplicate method; give each method once.")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}.")
    if args.esc10 is not None:
        from dali_llava.processing.corpora.avworld.recordings import find_recordings

        find_recordings(args.esc10)  # raises an error for missing recordings before training starts

    from dali_llava.eval.avworld.comparison import compare
    from dali_llava.eval.figures import plot_mean_tokens
    from dali_llava.eval.results import Results, print_results, versions, write_results

    start = time.monotonic()
    quieten()
    folders = train(args.out, args.seed, methods, args.esc10)
    announce("evaluation")
    found = compare(folders, methods, args.seed, args.out, args.esc10)
    figure = plot_mean_tokens(found.image_tokens, found.audio_tokens, args.out / "figures" / "mean_tokens.png")
    results = Results("avworld", time.monotonic() - start, versions(), found.rows, found.claims)
    write_results(results, args.out)
    print_results(results)
    print_examples(found.examples, methods)
    print(f"\nwritten: {args.out}/results.md, {figure}, {args.out}/model")
    print(f"next:    dali-llava caption {args.out}/model FILE ...")
    return 0


def announce(text: str) -> None:
    """Print a headline to stderr."""
    from rich.console import Console

    Console(stderr=True).rule(f"[bold]{text}", align="left")


def train(out: Path, seed: int, methods: list[str], recordings: Path | None = None) -> dict[str, Path]:
    """Run all stages.

    Returns:
        the folders of the checkpoints by name: captioner, prefix, tower (with recordings only), METHOD-aligned,
        METHOD-distilled, and model, the complete captioner of the last method.
    """
    from dali_llava.train import align, distill, prefix_tune
    from dali_llava.train.avworld import pretrain_tower
    from dali_llava.train.avworld.captioner_cache import pretrained_captioner
    from dali_llava.train.command_line import CONFIGS
    from dali_llava.train.data.caption_file import CAPTIONS

    configs = CONFIGS / "avworld"
    folders = {"captioner": out / "captioner", "prefix": out / "prefix", "model": out / "model"}
    alignment, start, corpus = "align.yaml", "prefix", []
    if recordings is not None:
        options = {"recordings": str(recordings), "sizes": {"train": RECORDINGS_CLIPS}}
        alignment, start = "align_recordings.yaml", "tower"
        corpus = ["--dataset_options", json.dumps(options)]

    announce("captioner: train an image captioner from scratch (cached)")
    shutil.copytree(pretrained_captioner(configs / "captioner.yaml"), folders["captioner"], dirs_exist_ok=True)

    def stage(main, config: str, base: str, name: str, *words: str) -> None:
        folders[name] = out / name
        paths = ["--base_model", str(folders[base]), "--output_dir", str(folders[name])]
        main([str(configs / config), *paths, "--seed", str(seed), "--report_to", "none", *words])

    announce("prefix: tune the prefix on 16 images with audio captions")
    stage(prefix_tune.main, "prefix_tune.yaml", "captioner", "prefix")
    if start == "tower":
        announce("audio tower: pretrain on audio alone, because there are few recordings")
        stage(pretrain_tower.main, "pretrain_tower.yaml", "prefix", "tower", *corpus)
    for method in methods:
        announce(f"{method}: align audio tokens with image tokens")
        stage(align.main, alignment, start, f"{method}-aligned", "--objective", method, *corpus)
        announce(f"{method}: distill audiovisual captions into the audio projector")
        (out / f"{method}-distilled" / CAPTIONS).unlink(missing_ok=True)  # of an earlier run in this folder
        stage(distill.main, "distill.yaml", f"{method}-aligned", f"{method}-distilled", *corpus)
    last = folders[f"{methods[-1]}-distilled"]
    merge_checkpoint(last, folders["model"], replace=True)
    return folders


def print_examples(examples: list[tuple[str, dict[str, str]]], methods: list[str]) -> None:
    """Print a table of references and captions to stdout, with one section per clip and one line per method."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    columns = [f"{modality}, {stage}" for stage, modality in SHOWN_SYSTEMS]
    table = Table("reference", "method", *columns, title="references and captions")
    for reference, captions in examples:
        for number, method in enumerate(methods):
            said = [captions[f"{method}-{stage}-{modality}"] for stage, modality in SHOWN_SYSTEMS]
            table.add_row("" if number else reference, method, *said, end_section=number == len(methods) - 1)
    console.print(table)


def quieten() -> None:
    """Silence the libraries, so that stderr shows only our headlines and progress bars."""
    import datasets
    from transformers import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    sys.stderr.flush()
