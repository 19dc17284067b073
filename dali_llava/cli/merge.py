"""Merge a stage or an adapter with its base models into one complete checkpoint.

The folder of a stage only contains the weights that the stage trained, and the path of its base model. OUT contains
all weights, with adapters merged into them, the processor, the generation configuration and the code, so it can be
copied or uploaded on its own. It is written completely or not at all.

examples:
  dali-llava merge runs/mmd-distilled captioner
  dali-llava caption captioner clip.mp4
"""

import argparse
import os
from pathlib import Path

from dali_llava.atomic import check_new_folder, new_folder

from .loading import check_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("model", metavar="STAGE", help="folder of a stage or an adapter, or its ORG/NAME on the Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be empty or not exist")


def run(args: argparse.Namespace) -> int:
    """Merge the stage and print the folder that was written."""
    check_model(args.model)
    check_new_folder(args.out)

    from transformers import logging

    logging.disable_progress_bar()
    merge_checkpoint(args.model, args.out)
    print(f"written: {args.out}")
    return 0


def merge_checkpoint(name: str | os.PathLike, out: Path, replace: bool = False) -> None:
    """
    Write the complete model of a stage and its processor.

    Args:
        name: folder or Hub id of a stage or a complete checkpoint.
        out: folder to write. It is created when the checkpoint is complete.
        replace: whether to replace `out` if it is not empty.

    Raises:
        FileExistsError: if `out` is not empty and `replace` is not set.
        OSError, ValueError: as in `load_captioner`.
    """
    from dali_llava.eval.captioner import load_captioner

    if not replace:
        check_new_folder(out)
    model, processor = load_captioner(str(name))
    with new_folder(out, replace) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
