"""Merge a stage with the models below it into one whole checkpoint.

A stage's folder holds only the weights that the stage trained, and the path of its base model. OUT holds everything:
weights, processor, generation configuration and code, so it can be copied or uploaded alone. It is written completely
or not at all.

examples:
  dali-llava merge runs/mmd-distilled captioner
  dali-llava caption captioner clip.mp4
"""

import argparse
import os
import tempfile
from pathlib import Path

from .loading import check_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("model", metavar="STAGE", help="a stage's folder, or the ORG/NAME of one on the Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist, or be empty")


def run(args: argparse.Namespace) -> int:
    """Merge, and print what was written."""
    check_model(args.model)
    check_out(args.out)

    from transformers import logging

    logging.disable_progress_bar()
    merge_checkpoint(args.model, args.out)
    print(f"written: {args.out}")
    return 0


def check_out(out: Path) -> None:
    """FileExistsError where `out` is a file, or a folder with something in it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; name another folder, or remove it first")


def merge_checkpoint(name: str | os.PathLike, out: Path, replace: bool = False) -> None:
    """
    Write the whole model that a stage's checkpoint assembles to, with its processor.

    Args:
        name: folder or Hub id, of a stage or of a whole checkpoint.
        out: folder to write. It appears when it is complete.
        replace: replace an `out` that has something in it.

    Raises:
        FileExistsError: `out` has something in it.
        OSError, ValueError: as `load_captioner`.
    """
    from dali_llava.eval.captioner import load_captioner

    if not replace:
        check_out(out)
    model, processor = load_captioner(str(name))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        merged = Path(scratch) / "merged"
        merged.mkdir()  # with the user's permissions; the scratch folder is private
        model.save_pretrained(merged)
        processor.save_pretrained(merged)
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        merged.rename(out)
