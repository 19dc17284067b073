"""Turn the media of a corpus into shards that training streams: tar archives of 16 kHz FLAC and JPEG frames.

Each clip is decoded and cut once, on all cores. A run that was stopped, killed even, goes on where it was when the
same command is given again. Clips that are missing, broken, silent, frozen or too short are left out, counted at the
end and listed in OUT/report.csv. OUT/index.json is written when all shards are there.

examples:
  dali-llava prepare folder --data-dir clips --out shards
  dali-llava prepare audiocaps --csv audiocaps/test.csv --data-dir videos --split test --out shards/audiocaps-test
  dali-llava prepare audioset --csv audioset --data-dir videos --split balanced_train --out shards/balanced
  dali-llava prepare clotho --csv clotho --data-dir clotho/evaluation --split evaluation --out shards/clotho
  dali-llava prepare cav_mae_json --json train.json --out shards/train --num-jobs 8 --job-id $SLURM_ARRAY_TASK_ID
"""

import argparse
import sys

from .loading import positive_int


# Corpus -> its line in the help, its splits ("train" alone need not be named), and its options of `load_corpus`.
CORPORA = {
    "audioset": (
        "AudioSet, from its segment lists",
        ("balanced_train", "unbalanced_train", "eval"),
        ("csv", "labels_csv", "whole_videos"),
    ),
    "audiocaps": ("AudioCaps, from its CSV files", ("train", "val", "test"), ("csv", "whole_videos")),
    "clotho": ("Clotho, from its CSV files", ("development", "validation", "evaluation"), ("csv",)),
    "cav_mae_json": ("a list of clips as CAV-MAE has it", ("train",), ("json", "labels_csv")),
    "folder": ("a folder of clips, with a table or without", ("train",), ("metadata",)),
}
OPTIONS = {
    "csv": {"metavar": "PATH", "help": "the list of the clips, or the folder of all lists; default: in --data-dir"},
    "labels_csv": {"metavar": "FILE", "help": "AudioSet's class_labels_indices.csv, for the labels' names"},
    "json": {"metavar": "FILE", "required": True, "help": "the list of the clips"},
    "metadata": {"metavar": "FILE", "help": "the table of the clips; default: metadata.csv or .jsonl in the folder"},
    "whole_videos": {
        "action": "store_true",
        "help": "a file named by the YouTube id alone is the whole video, to be cut, and not the clip",
    },
}
EXAMPLES = {
    "audioset": "--csv audioset --data-dir videos --split eval --out shards/eval",
    "audiocaps": "--csv audiocaps/test.csv --data-dir videos --split test --out shards/audiocaps-test",
    "clotho": "--csv clotho --data-dir clotho/evaluation --split evaluation --out shards/clotho",
    "cav_mae_json": "--json train.json --data-dir frames --out shards/train",
    "folder": "--data-dir clips --out shards",
}
# What of the command line is a setting of a clip, under the same name.
CLIP_SETTINGS = ("frames", "frame_size", "quality", "min_seconds", "silence", "keep_silent", "keep_frozen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each corpus."""
    corpora = parser.add_subparsers(
        dest="corpus", metavar="CORPUS", required=True, title="corpora", parser_class=argparse.ArgumentParser
    )
    for name, (line, splits, options) in CORPORA.items():
        corpus = corpora.add_parser(
            name,
            help=line,
            description=f"Shards of {line}. `dali-llava prepare --help` tells what they are.",
            epilog=f"example: dali-llava prepare {name} {EXAMPLES[name]}",
        )
        corpus.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        for option in options:
            corpus.add_argument(f"--{option.replace('_', '-')}", **OPTIONS[option])
        # the JSON of CAV-MAE has paths of its own
        corpus.add_argument(
            "--data-dir", required=name != "cav_mae_json", metavar="DIR", help="the folder of the media, at any depth"
        )
        if len(splits) > 1:
            corpus.add_argument("--split", required=True, choices=splits)
        else:
            corpus.set_defaults(split=splits[0])
        _add_common_arguments(corpus)


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards, made if missing")
    clips = parser.add_argument_group("clips")
    clips.add_argument(
        "--frames", type=positive_int, default=10, metavar="N", help="pictures a clip at most; default: %(default)s"
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
    work.add_argument("--num-proc", type=positive_int, metavar="N", help="processes; default: one a core")
    work.add_argument(
        "--num-jobs", type=positive_int, default=1, metavar="N", help="jobs of an array that share the shards"
    )
    work.add_argument("--job-id", type=int, default=0, metavar="K", help="this job's number, from 0")


def run(args: argparse.Namespace) -> int:
    """Prepare `args.corpus` and print what became of its clips; 0, also when some were left out."""
    if not 0 <= args.job_id < args.num_jobs:
        raise ValueError(f"--job-id must be one of 0 to {args.num_jobs - 1} (--num-jobs less 1), not {args.job_id}")

    from rich.console import Console

    with Console(stderr=True).status(f"reading the list of {args.corpus}"):
        from dali_llava.processing.shards import ClipSettings, prepare_shards
        from dali_llava.processing.shards.plan import default_requirements

        chosen = {name: getattr(args, name) for name in CLIP_SETTINGS}
        settings = ClipSettings(**chosen)  # bad values are told before anything is read
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
    """The rows of the corpus, those without media included: they are reported like the others that are left out.

    Raises:
        FileNotFoundError: none has media, so that the folder must be another.
    """
    from dali_llava.processing.corpora import load_corpus

    options = {name: getattr(args, name) for name in CORPORA[args.corpus][2] if name != "whole_videos"}
    options = {name: value for name, value in options.items() if value is not None}
    if getattr(args, "whole_videos", False):
        options["cut"] = False
    rows = load_corpus(args.corpus, args.split, data_dir=args.data_dir, missing="keep", **options)
    media = rows.select_columns(["audio", "frames"])
    if not any(row["frames"] or (row["audio"] or {}).get("path") for row in media):
        where = args.data_dir or args.json
        raise FileNotFoundError(f"{where}: has none of the {len(rows)} clips' files; check --data-dir and their names")
    return rows
