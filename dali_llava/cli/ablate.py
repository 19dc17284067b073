"""Train and score the ablations of a method on AVWorld, and print them beside the figures of its paper.

For each seed, an audio tower is pretrained, and each row of the tables is trained from it and scored. A row that is
finished in OUT is not trained again. The command writes ablation.json and ablation.md to OUT, and the checkpoint and
the captions of each row to OUT/seedN. All rows with three seeds take about 90 minutes on two cores.

examples:
  dali-llava ablate lavcap
  dali-llava ablate lavcap --rows concatenation,concatenation_loss --seeds 0
"""

import argparse
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from .quickstart import announce, quieten


METHODS = ("lavcap",)
TOWER_STEPS = 1000  # half of those of pretrain_tower.yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dali-llava ablate`."""
    parser.add_argument("method", choices=METHODS, metavar="METHOD", help="the method: lavcap")
    parser.add_argument("--rows", metavar="NAME,...", help="rows to train and score; default: all")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,...", help="seeds of the runs; default: %(default)s")
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="split to score; default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), metavar="DIR", help="output folder; default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Train and score the rows that are not finished, then print and write the tables.

    Raises:
        ValueError: if a row is unknown, a row or a seed is given twice, a seed is not a number, or a finished row was
            trained with other arguments.
    """
    from dali_llava.eval.avworld.ablation import (
        ablation_rows,
        read_row,
        score_row,
        to_markdown,
        write_ablation,
        write_row,
    )
    from dali_llava.eval.caption_metrics import CaptionScorer
    from dali_llava.processing.corpora import load_corpus
    from dali_llava.train.command_line import CONFIGS, read_yaml

    known = ablation_rows()
    chosen = list(known) if args.rows is None else args.rows.split(",")
    for name in chosen:
        if name not in known:
            raise ValueError(f"--rows: unknown row '{name}'; choose from {', '.join(known)}.")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--rows {args.rows}: duplicate row; give each row once.")
    seeds = parse_seeds(args.seeds)
    common = read_yaml(CONFIGS / "avworld" / "lavcap.yaml")
    runs = {
        (seed, name): (args.out / f"seed{seed}" / f"{name}-{args.split}.json", common | known[name])
        for seed in seeds
        for name in chosen
    }
    results = {run: read_row(*found) for run, found in runs.items()}

    start = time.monotonic()
    quieten()
    rows = load_corpus("avworld", args.split, num_proc=os.cpu_count())
    with CaptionScorer() as scorer:
        for (seed, name), (path, arguments) in runs.items():
            if results[seed, name] is None:
                announce(f"seed {seed}: {name}")
                folder = args.out / f"seed{seed}"
                model = train_row(folder, name, known[name], seed)
                row = score_row(name, model, seed, rows, args.split, folder / "captions", scorer)
                write_row(path, row, arguments)
                results[seed, name] = row
    written = write_ablation(args.out, results.values(), args.split, time.monotonic() - start)
    print(to_markdown(results.values(), args.split))
    print(f"written: {', '.join(map(str, written))}")
    return 0


def parse_seeds(text: str) -> list[int]:
    """Parse seeds that are separated by commas. Raises a ValueError if one is not a number, or given twice."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--seeds {text}: expected numbers such as 0,1,2.")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: duplicate seed; give each seed once.")
    return seeds


def train_row(folder: Path, name: str, arguments: Mapping, seed: int) -> Path:
    """Train a row from the base of its seed, which is trained first if it is missing. Returns the model's folder."""
    from dali_llava.train import lavcap
    from dali_llava.train.command_line import as_words

    base = train_base(folder, seed)
    _train(lavcap.main, "lavcap.yaml", base, folder / name, seed, *as_words(arguments))
    return folder / name


def train_base(folder: Path, seed: int) -> Path:
    """Pretrain the audio tower of the cached captioner on sounds alone, once. Returns the folder of the model."""
    from dali_llava.train.avworld import pretrain_tower
    from dali_llava.train.avworld.captioner_cache import pretrained_captioner
    from dali_llava.train.command_line import CONFIGS

    captioner, tower = folder / "captioner", folder / "tower"
    if not tower.is_dir():
        shutil.copytree(pretrained_captioner(CONFIGS / "avworld" / "captioner.yaml"), captioner, dirs_exist_ok=True)
        unfinished = folder / ".tower"
        steps = ["--max_steps", str(TOWER_STEPS)]
        _train(pretrain_tower.main, "pretrain_tower.yaml", captioner, unfinished, seed, *steps)
        os.replace(unfinished, tower)
    return tower


def _train(main, config: str, base: Path, output: Path, seed: int, *words: str) -> None:
    from dali_llava.train.command_line import CONFIGS

    paths = ["--base_model", str(base), "--output_dir", str(output)]
    main([str(CONFIGS / "avworld" / config), *paths, "--seed", str(seed), "--report_to", "none", *words])
