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
from pathlib import Path

from .corpora import add_corpus_arguments, is_shards, open_corpus
from .loading import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dali-llava inspect`."""
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus's name, or a folder of shards")
    parser.add_argument("--split", metavar="NAME", help="of the corpus; may be left out where there is only one")
    add_corpus_arguments(parser)
    parser.add_argument("--samples", type=positive_int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--check", type=positive_int, default=0, metavar="N", help="random clips to decode; default: the samples"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random choice; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/inspect/CORPUS-SPLIT, or shards-FOLDER")


def run(args: argparse.Namespace) -> int:
    """Count, open, print and write; broken clips are a result, not an error."""
    from dali_llava.processing.inspect.page import PAGE, check_output, write_page
    from dali_llava.processing.inspect.summary import inspect_rows

    rows, args.split = open_corpus(args.corpus, args.split, args, streaming=True)
    shards = Path(args.corpus).resolve().name if is_shards(args.corpus) else None
    name = f"{args.corpus}-{args.split}" if shards is None else f"shards-{shards}"
    index = Path(args.corpus, "index.json")
    total = json.loads(index.read_text(encoding="utf-8"))["clips"] if index.is_file() else None
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
