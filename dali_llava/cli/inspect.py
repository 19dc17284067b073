"""Look into a corpus: its figures as a table, and a page with charts and random clips to hear and see.

CORPUS is a name (audiocaps, audioset, avworld, cav_mae_json, clotho, folder) or a folder of shards that
`dali-llava prepare` wrote. Goes through the clips once; only the random ones are decoded. Writes OUT/index.html,
OUT/summary.json and the samples' media, OUT/media.

examples:
  dali-llava inspect folder --data-dir clips
  dali-llava inspect audiocaps --split test --data-dir audiocaps/media --option csv=audiocaps/dataset --check 100
  dali-llava inspect avworld --split test --option 'sizes={"test": 50}'
  dali-llava inspect shards/audiocaps --out runs/look
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .loading import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dali-llava inspect`."""
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus's name, or a folder of shards")
    parser.add_argument("--split", metavar="NAME", help="of the corpus; may be left out where there is only one")
    parser.add_argument("--data-dir", metavar="DIR", help="where the media lie")
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the corpus, in JSON or as text; may be repeated",
    )
    parser.add_argument("--samples", type=positive_int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--check", type=positive_int, default=0, metavar="N", help="random clips to decode; default: the samples"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random choice; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/inspect/CORPUS-SPLIT")


def run(args: argparse.Namespace) -> int:
    """Count, open, print and write; broken clips are a result, not an error."""
    from dali_llava.processing.inspection import inspect_rows
    from dali_llava.processing.inspection_page import PAGE, check_output, write_page

    name, rows, total = _open(args)
    out = args.out or Path("runs/inspect", name)
    check_output(out)  # before the pass, which may take hours
    summary, samples = inspect_rows(rows, args.samples, args.check, args.seed, total)
    about = {"corpus": args.corpus, "split": args.split, "data_dir": args.data_dir, "options": dict(args.option)}
    write_page(out, name, summary, samples, about | {"seed": args.seed})
    table = summary.table()
    width = max(len(line) for line, _ in table)
    for line, value in table:
        print(f"{line:<{width}}  {value}")
    print(f"\nwritten: {out / PAGE}")
    return 0


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, not {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _open(args: argparse.Namespace) -> tuple[str, Iterable[Mapping[str, Any]], int | None]:
    """The corpus's name for the page, its rows, and their number where that is known."""
    index = Path(args.corpus, "index.json")
    if "/" in args.corpus or index.is_file():
        return _open_shards(args, index)
    from dali_llava.processing.corpora import load_corpus

    options = dict(args.option) if args.data_dir is None else {"data_dir": args.data_dir, **dict(args.option)}
    rows = load_corpus(args.corpus, args.split, streaming=True, **options)
    if args.split is None:
        if len(rows) > 1:
            raise ValueError(f"corpus {args.corpus!r} has several splits: choose --split from {', '.join(rows)}")
        ((args.split, rows),) = rows.items()
    return f"{args.corpus}-{args.split}", rows, None


def _open_shards(args: argparse.Namespace, index: Path) -> tuple[str, Iterable[Mapping[str, Any]], int | None]:
    if args.split or args.data_dir or args.option:
        raise ValueError(f"{args.corpus}: shards take no --split, --data-dir or --option; leave them out")
    is_local = "://" not in args.corpus
    if is_local and not index.is_file():
        remedy = "`dali-llava prepare` makes it; a folder of clips is inspected with `folder --data-dir`"
        raise FileNotFoundError(f"{index}: no such file, so {args.corpus} holds no shards; {remedy}")
    from dali_llava.processing.corpora import load_corpus

    total = json.loads(index.read_text(encoding="utf-8"))["clips"] if is_local else None
    rows = load_corpus("shards", "train", streaming=True, data_dir=args.corpus)
    return Path(args.corpus).resolve().name, rows, total
