"""Write the image captioner in a captioner as a LLaVA that transformers loads without this package.

OUT contains the vision tower, the image projector and the language model with the names that LLaVA has on the Hub.
Tensors that no stage has trained equal those of the LLaVA that the captioner was converted from, and the vocabulary
has the same size. The processor has the tokenizer without the placeholders for audio, and the chat template of MODEL.

example:
  dali-llava export-llava captioner llava
"""

import argparse
from pathlib import Path

from dali_llava.atomic import check_new_folder, new_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("model", metavar="MODEL", help="folder of a captioner, or its ORG/NAME on the Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be empty or not exist")


def run(args: argparse.Namespace) -> int:
    """Write the image captioner and print the folder."""
    check_new_folder(args.out)

    from dali_llava.modeling.convert.download import find_source
    from dali_llava.modeling.convert.export_llava import export_llava
    from dali_llava.processing.assembly import save_llava_processor

    model = find_source(args.model)
    with new_folder(args.out) as folder:
        export_llava(model, folder)
        save_llava_processor(model, folder)
    print(f"written: {args.out}")
    return 0
