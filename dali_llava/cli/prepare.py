"""Convert the media of a corpus to shards for training: tar archives of 16 kHz FLAC and JPEG frames.

Each clip is decoded and cut once, on all cores. To resume an interrupted or killed run, run the same command again.
Clips that are missing, broken, silent, frozen or too short are left out, counted at the end and listed in
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


# Arguments that are fields of `ClipSettings` with the same name.
CLIP_SETTINGS = ("frames", "frame_size", "quality", "min_seconds", "silence", "keep_silent", "keep_frozen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all corpora share."""
    from dali_llava.processing.corpora import known_corpora

    known = list(known_corpora())
    parser.add_argument("corpus", metavar="CORPUS", choices=known, help=", ".join(known))
    parser.add_argument("--split", metavar="NAME", help="split of the corpus; required if there are several")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the shards; created if it does not exist"
    )
    clips = parser.add_argument_group("clips")
    clips.add_argument(
        "--frames",
        type=positive_int,
        default=10,
        metavar="N",
        help="maximum number of frames per clip; default: %(default)s",
    )
    clips.add_argument(
        "--frame-size",
        type=positive_int,
        default=336,
        metavar="PIXELS",
        help="maximum shorter side of a frame; default: %(default)s, the input size of LLaVA-1.5",
    )
    clips.add_argument(
        "--quality", type=positive_int, default=90, metavar="Q", help="JPEG quality, 1 to 95; default: %(default)s"
    )
    clips.add_argument(
        "--require",
        choices=("audio", "frames", "audio,frames"),
        metavar="WHAT",
        help="what a clip must have: audio, frames or audio,frames; default: audio, and frames if the corpus has any",
    )
    clips.add_argument(
        "--min-seconds", type=float, default=1.0, metavar="S", help="minimum length of the sound; default: %(default)s"
    )
    clips.add_argument(
        "--silence",
        type=float,
        default=0.001,
        metavar="PEAK",
        help="peak below which a sound is silent; full scale is 1; default: %(default)s (-60 dB)",
    )
    clips.add_argument("--keep-silent", action="store_true", help="keep silent clips")
    clips.add_argument("--keep-frozen", action="store_true", help="keep clips in which all frames are alike")
    shards = parser.add_argument_group("shards")
    shards.add_argument(
        "--shard-size",
        type=positive_int,
        default=500,
        metavar="MB",
        help="approximate size of a shard; default: %(default)s",
    )
    shards.add_argument(
        "--clips-per-shard",
        type=positive_int,
        metavar="N",
        help="clips per shard; default: estimated from --shard-size",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--num-proc", type=positive_int, metavar="N", help="number of processes; default: one per core")
    work.add_argument(
        "--num-jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of array jobs that share the work; default: %(default)s",
    )
    work.add_argument(
        "--job-id", type=int, default=0, metavar="K", help="number of this job, from 0; default: %(default)s"
    )


def complete_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of the corpus that is named in `words`, and an example."""
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
    """Return the options of a corpus that the command sets. Clips without media are kept, to be reported."""
    from dali_llava.processing.corpora import configuration_of
    from dali_llava.processing.corpora.options import options_of

    known = {option.name for option in options_of(configuration_of(corpus))}
    return {name: value for name, value in {"missing": "keep"}.items() if name in known}


def run(args: argparse.Namespace) -> int:
    """Prepare `args.corpus` and print a summary. Return 0, even if clips were left out."""
    if not 0 <= args.job_id < args.num_jobs:
        raise ValueError(f"--job-id must be one of 0 to {args.num_jobs - 1} (--num-jobs minus 1), not {args.job_id}")

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
        raise ValueError(f"{args.out}: no clip is ready; see the reasons in {args.out}/report.csv")
    return 0


def _load_rows(args: argparse.Namespace):
    """
    Load the rows of the corpus, including rows without media, which are reported as left out.

    Raises:
        FileNotFoundError: if no row has media, so the folder is probably wrong.
    """
    from dali_llava.processing.shards.clip import is_given

    rows, args.split = open_named_corpus(args.corpus, args.split, args, **fixed_options(args.corpus))
    media = rows.select_columns(["audio", "frames"])
    if not any(row["frames"] or is_given(row["audio"]) for row in media):
        where = corpus_options(args).get("data_dir", args.corpus)
        raise FileNotFoundError(f"{where}: has no media of the {len(rows)} clips; check --data-dir and the file names")
    return rows
