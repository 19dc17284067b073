"""Write the model card of a model, or of a recipe.

The card has only what files record: the stages (stage.json) and their training state (checkpoint-N), the released
weights that the model was converted from and their licences (config.json), and the rows of the model in results files
of `quickstart` or `evaluate`. What is not recorded is left out. The metadata has the results as a model index.

For a recipe, give the YAML configurations of its stages. Its card says that no weights exist.

A README.md that this command did not write is not replaced without --force.

examples:
  dali-llava card runs/quickstart/mmd-distilled --results runs/quickstart/results.json --name dali-avworld
  dali-llava card captioner --results audiocaps.json clotho.json
  dali-llava card train/configs/full/lavcap.yaml --name lavcap --out model_cards/lavcap.md
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument(
        "model", nargs="+", type=Path, metavar="MODEL", help="folder of a model, or the YAML files of a recipe"
    )
    parser.add_argument(
        "--results", nargs="+", type=Path, default=[], metavar="FILE.json", help="results with rows of the model"
    )
    parser.add_argument("--name", help="name in the card; default: that of the folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write; default: MODEL/README.md")
    parser.add_argument("--force", action="store_true", help="replace a card that was written by hand")


def run(args: argparse.Namespace) -> int:
    """Write the card, print its path, and return 0.

    Raises:
        ValueError: --out or --name of a recipe is missing, a recipe has --results, or there are several models.
        OSError, ValueError: as in `model_card`, `recipe_card` and `write_card`.
    """
    from dali_llava.eval.card import RECIPE_SUFFIXES, model_card, recipe_card, write_card

    if all(path.suffix in RECIPE_SUFFIXES for path in args.model):
        if args.out is None or args.name is None:
            raise ValueError("the card of a recipe needs --out and --name; add them")
        if args.results:
            raise ValueError("a recipe has no results; give --results with the folder of a model")
        card = recipe_card(args.model, args.name)
    elif len(args.model) > 1:
        raise ValueError(f"{args.model[1]}: a second model; give one folder, or the YAML files of a recipe")
    else:
        card = model_card(args.model[0], args.results, args.name)
    out = args.out or args.model[0] / "README.md"
    write_card(card, out, args.force)
    print(f"written: {out}")
    return 0
