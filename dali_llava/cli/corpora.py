"""What the commands that read a corpus share: its arguments, and loading it."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the corpus lies, and its own options."""
    parser.add_argument("--data-dir", metavar="DIR", help="where the media lie")
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the corpus, in JSON or as text; may be repeated",
    )


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, not {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def is_shards(corpus: str) -> bool:
    """Whether CORPUS is a folder of shards, or the URL of one, rather than a corpus's name."""
    return "/" in corpus or Path(corpus, "index.json").is_file()


def open_corpus(corpus: str, split: str | None, args: argparse.Namespace, streaming: bool = False):
    """
    The rows of a corpus, or of a folder of shards.

    Args:
        corpus: a name of `load_corpus`, or a folder of shards, which takes no split and no options.
        split: None for the only one there is.
        args: of `add_corpus_arguments`.
        streaming: as in `load_corpus`.

    Returns:
        the rows, and the split's name.

    Raises:
        ValueError, FileNotFoundError: as `load_corpus`; a corpus of several splits of which none is named; options
            for shards.
    """
    from dali_llava.processing.corpora import load_corpus

    if is_shards(corpus):
        if split or args.data_dir or args.option:
            raise ValueError(f"{corpus}: shards take no --split, --data-dir or --option; leave them out")
        index = Path(corpus, "index.json")
        if "://" not in corpus and not index.is_file():
            remedy = "`dali-llava prepare` makes it; a folder of clips is the corpus `folder`, with --data-dir"
            raise FileNotFoundError(f"{index}: no such file, so {corpus} holds no shards; {remedy}")
        return load_corpus("shards", "train", streaming=streaming, data_dir=corpus), "train"
    options = dict(args.option) if args.data_dir is None else {"data_dir": args.data_dir, **dict(args.option)}
    rows = load_corpus(corpus, split, streaming=streaming, **options)
    if split is not None:
        return rows, split
    if len(rows) > 1:
        raise ValueError(f"corpus {corpus!r} has several splits: choose --split from {', '.join(rows)}")
    ((split, rows),) = rows.items()
    return rows, split
