"""Turn the media of a corpus into shards that training streams: tar archives of 16 kHz FLAC and JPEG frames.

Each clip is decoded and cut once, on all cores. A stopped run, even a killed one, continues when the same command is
given again. Clips that are missing, broken, silent, frozen or too short are left out, counted at the end and listed in
OUT/report.csv. OUT/index.json is written when all shards are complete.

`dali-llava prepare CORPUS --help` shows the options of a corpus.

examples:
  dali-llava prepare folder --data-dir clips --out shards
  dali-llava prepare audiocaps --csv audiocaps/test.csv --data-dir videos --split test --out shards/audiocaps-test
  dali-llava prepare audioset --csv audioset --data-dir videos --split balanced_train --out shards/balanced
  dali-llava prepare clotho --csv clotho --data-dir clotho/evaluation --split evaluation --out shards/clotho
  dali-llava prepare cav_mae_json --json train.json --out shards/train --num-jobs 8 --job-id $SLURM_ARRAY_TASK_ID
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .corpora import add_corpus_options, corpus_options, example_options, first_positional, open_named_corpus
from .loading import positive_int


# What of the command line is a setting of a clip, under the same name.
CLIP_SETTINGS = ("frames", "frame_size", "quality", "min_seconds", "silence", "keep_silent", "keep_frozen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every corpus has."""
    from dali_llava.processing.corpora import known_corpora

    known = list(known_corpora())
    parser.add_argument("corpus", metavar="CORPUS", choices=known, help=", ".join(known))
    parser.add_argument("--split", metavar="NAME", help="split of the corpus; required where it has several")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards, made if missing")
    clips = parser.add_argument_group("clips")
    clips.add_argument(
        "--frames", type=positive_int, default=10, metavar="N", help="pictures per clip at most; default: %(default)s"
    )
    clips.add_argument(
        "--frame-size",
        type=positive_int,
        default=336,
        metavar="PIXELS",
        help="shorter side of a picture at most; default: %(default)s, what LLaVA-1.5 sees",
    )
    clips.add_argument(
        "--quality", type=positive_int, default=90, metavar="Q", help="of the JPEG files, to 95; default: %(default)s"
    )
    clips.add_argument(
        "--require",
        choices=("audio", "frames", "audio,frames"),
        metavar="WHAT",
        help="of a clip: audio, frames or audio,frames; default: audio, and frames too where the corpus lists any",
    )
    clips.add_argument(
        "--min-seconds", type=float, default=1.0, metavar="S", help="least length of a sound; default: %(default)s"
    )
    clips.add_argument(
        "--silence",
        type=float,
        default=0.001,
        metavar="PEAK",
        help="a sound whose peak is below is silent, full scale being 1; default: %(default)s (-60 dB)",
    )
    clips.add_argument("--keep-silent", action="store_true", help="do not leave out silent clips")
    clips.add_argument("--keep-frozen", action="store_true", help="do not leave out clips whose frames are all alike")
    shards = parser.add_argument_group("shards")
    shards.add_argument(
        "--shard-size", type=positive_int, default=500, metavar="MB", help="of a shard, roughly; default: %(default)s"
    )
    shards.add_argument(
        "--clips-per-shard", type=positive_int, metavar="N", help="default: as many as make --shard-size, by a sample"
    )
    work = parser.add_argument_group("work")
    work.add_argument("--num-proc", type=positive_int, metavar="N", help="processes; default: one per core")
    work.add_argument(
        "--num-jobs", type=positive_int, default=1, metavar="N", help="jobs of an array that share the shards"
    )
    work.add_argument("--job-id", type=int, default=0, metavar="K", help="this job's number, from 0")


def complete_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of the corpus that `words` name, and an example."""
    from dali_llava.processing.corpora import configuration_of, known_corpora

    corpus = first_positional(parser, words)
    if corpus not in known_corpora():
        return
    add_corpus_options(parser, corpus, may_be_shards=False, without=fixed_options(corpus))
    configuration = configuration_of(corpus)
    if not hasattr(configuration, "find_splits"):
        (split,) = (action for action in parser._actions if action.dest == "split")
        split.choices, split.metavar, split.required = configuration.splits, None, len(configuration.splits) > 1
    parser.epilog = f"example: dali-llava prepare {corpus} {example_options(corpus)} --out shards/{corpus}"


def fixed_options(corpus: str) -> dict[str, Any]:
    """The options of a corpus that the command sets: clips without media stay, to be reported as left out."""
    from dali_llava.processing.corpora import configuration_of
    from dali_llava.processing.corpora.options import options_of

    known = {option.name for option in options_of(configuration_of(corpus))}
    return {name: value for name, value in {"missing": "keep"}.items() if name in known}


def run(args: argparse.Namespace) -> int:
    """Prepare `args.corpus` and print what became of its clips; 0, also when some were left out."""
    if not 0 <= args.job_id < args.num_jobs:
        raise ValueError(f"--job-id must be one of 0 to {args.num_jobs - 1} (--num-jobs less 1), not {args.job_id}")

    from rich.console import Console

    with Console(stderr=True).status(f"reading the list of {args.corpus}"):
        from dali_llava.processing.shards import ClipSettings, prepare_shards
        from dali_llava.processing.shards.plan import default_requirements

        chosen = {name: getattr(args, name) for name in CLIP_SETTINGS}
        settings = ClipSettings(**chosen)  # raises on bad values before anything is read
        rows = _load_rows(args)
        require = tuple(args.require.split(",")) if args.require else default_requirements(rows)
        settings = ClipSettings(**chosen, require=require)
    summary = prepare_shards(
        rows,
        args.out,
        settings,
        corpus=f"{args.corpus}/{args.split}",
        shard_size=args.shard_size,
        clips_per_shard=args.clips_per_shard,
        num_proc=args.num_proc,
        num_jobs=args.num_jobs,
        job_id=args.job_id,
    )
    print(summary)
    if not summary.is_complete:
        print("the other jobs have not finished; the last one writes the index", file=sys.stderr)
    elif summary.clips == 0:
        raise ValueError(f"{args.out}: no clip is ready; {args.out}/report.csv has the reason of each")
    return 0


def _load_rows(args: argparse.Namespace):
    """The rows of the corpus, with those that have no media: these are reported like the others that are left out.

    Raises:
        FileNotFoundError: no row has media, so the folder is probably the wrong one.
    """
    from dali_llava.processing.shards.clip import is_given

    rows, args.split = open_named_corpus(args.corpus, args.split, args, **fixed_options(args.corpus))
    media = rows.select_columns(["audio", "frames"])
    if not any(row["frames"] or is_given(row["audio"]) for row in media):
        where = corpus_options(args).get("data_dir", args.corpus)
        raise FileNotFoundError(f"{where}: has none of the {len(rows)} clips' files; check --data-dir and their names")
    return rows
