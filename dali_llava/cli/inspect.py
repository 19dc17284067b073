"""Summarise a corpus: print its statistics, and write a page with charts and random clips.

CORPUS is a name, or a folder of shards from `dali-llava prepare`. The corpus is read once, and only the random clips
are decoded. Writes OUT/index.html, OUT/summary.json and the media of the random clips, OUT/media.

`dali-llava inspect CORPUS --help` shows the options of a corpus, which are the same as for `dali-llava prepare`.

examples:
  dali-llava inspect folder --data-dir clips
  dali-llava inspect audiocaps --split test --data-dir audiocaps/media --csv audiocaps/dataset --check 100
  dali-llava inspect avworld --split test --sizes '{"test": 50}'
  dali-llava inspect shards/audiocaps --out runs/look
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .corpora import (
    add_corpus_options,
    corpus_options,
    example_options,
    first_positional,
    is_known,
    is_shards,
    open_corpus,
)
from .loading import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all corpora share."""
    from dali_llava.processing.corpora import known_corpora

    parser.add_argument("corpus", metavar="CORPUS", help=f"{', '.join(known_corpora())}, or a folder of shards")
    parser.add_argument("--split", metavar="NAME", help="split of the corpus; required if there are several")
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=10,
        metavar="N",
        help="number of random clips on the page; default: %(default)s",
    )
    parser.add_argument(
        "--check",
        type=positive_int,
        default=0,
        metavar="N",
        help="number of random clips to decode; default: the samples",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random choice; default: %(default)s"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write; default: runs/inspect/CORPUS-SPLIT or runs/inspect/shards-FOLDER",
    )


def complete_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of the corpus that is named in `words`, and an example."""
    corpus = first_positional(parser, words)
    add_corpus_options(parser, corpus)
    if is_known(corpus):
        parser.epilog = f"example: dali-llava inspect {corpus} {example_options(corpus)}"


def run(args: argparse.Namespace) -> int:
    """Inspect the corpus, print the statistics and write the page. Broken clips are not an error."""
    from dali_llava.processing.inspect.page import PAGE, check_output, write_page
    from dali_llava.processing.inspect.summary import inspect_rows

    rows, args.split = open_corpus(args.corpus, args.split, args, streaming=True)
    shards = Path(args.corpus).resolve().name if is_shards(args.corpus) else None
    name = f"{args.corpus}-{args.split}" if shards is None else f"shards-{shards}"
    index = Path(args.corpus, "index.json")
    total = json.loads(index.read_text(encoding="utf-8"))["clips"] if index.is_file() else None
    out = args.out or Path("runs/inspect", name)
    check_output(out)  # before reading the corpus, which may take hours
    summary, samples = inspect_rows(rows, args.samples, args.check, args.seed, total)
    options = corpus_options(args)
    data_dir = options.pop("data_dir", None)
    about = {"corpus": args.corpus, "split": args.split, "data_dir": data_dir, "options": options}
    write_page(out, name, summary, samples, about | {"seed": args.seed})
    table = summary.table()
    width = max(len(line) for line, _ in table)
    for line, value in table:
        print(f"{line:<{width}}  {value}")
    print(f"\nwritten: {out / PAGE}")
    return 0
