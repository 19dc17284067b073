"""Caption a test split and score the captions.

Writes the results file, and the captions and scores of all clips to the folder OUT.captions next to it. An interrupted
run resumes from these captions, and `dali-llava compare` takes the scores.

`dali-llava evaluate --dataset CORPUS --help` shows the options of a corpus, which are the same as for
`dali-llava prepare`.

examples:
  dali-llava evaluate runs/quickstart/model --dataset avworld --out results.json
  dali-llava evaluate MODEL --dataset audiocaps --data-dir audiocaps/media --csv audiocaps/dataset --out ac.json
  dali-llava evaluate MODEL --dataset clotho --split evaluation --data-dir clotho --modality audio --out clotho.json
  dali-llava evaluate MODEL --dataset shards/audiocaps-test --out audiocaps.json
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from .corpora import add_corpus_options, example_options, is_known, is_shards, open_corpus
from .loading import add_model_arguments, load_captioner


MODALITIES = ("audio", "image", "audiovisual")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all corpora share."""
    from dali_llava.processing.corpora import known_corpora

    add_model_arguments(parser)
    parser.add_argument(
        "--dataset", required=True, metavar="CORPUS", help=f"{', '.join(known_corpora())}, or a folder of shards"
    )
    parser.add_argument("--split", metavar="NAME", help="split of the corpus; default: test, or the only split")
    parser.add_argument(
        "--modality",
        nargs="+",
        choices=MODALITIES,
        default=["audio", "audiovisual"],
        help="modalities to caption from; default: audio audiovisual",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="results file to write")


def complete_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of the corpus that is named in `words`, and an example."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--dataset", nargs="?")
    corpus = finder.parse_known_args(words)[0].dataset
    add_corpus_options(parser, corpus)
    if is_known(corpus):
        options = example_options(corpus, "test")
        parser.epilog = f"example: dali-llava evaluate MODEL --dataset {corpus} {options} --out {corpus}.json"


def run(args: argparse.Namespace) -> int:
    """Caption and score the split, print and write the results. Return 1 if a clip could not be captioned."""
    import json
    import sys

    from dali_llava.atomic import write_text
    from dali_llava.eval.avworld.source_metrics import class_phrases
    from dali_llava.eval.caption_metrics import CaptionScorer
    from dali_llava.eval.evaluation import System, caption_split, score_split
    from dali_llava.eval.results import Results, print_results, versions
    from dali_llava.eval.runner import CaptionRunner

    start = time.monotonic()
    rows, split = open_corpus(args.dataset, args.split or default_split(args.dataset), args)
    check_rows(rows, args.modality, args.dataset)
    model, processor = load_captioner(args.model, args.device, args.dtype)
    runner = CaptionRunner(
        model, processor, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, num_beams=args.num_beams
    )
    stage = "distilled" if "audio" not in model.config.prefix_modalities else "aligned"
    captions = args.out.with_suffix(".captions")
    with CaptionScorer() as scorer:
        said = []
        for modality in args.modality:
            system = System(Path(args.model).resolve().name, stage, modality, processor.sound_prompt)
            said.append(caption_split(runner, rows, system, split, captions))
        classes = class_phrases() if args.dataset == "avworld" else None
        table = score_split(scorer, rows, said, 0, classes, captions)
    results = Results(args.dataset, time.monotonic() - start, versions(), table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(results.to_dict(), indent=2, ensure_ascii=False) + "\n")
    print_results(results)
    failures = {name: error for one in said for name, error in one.failures.items()}
    for name, error in failures.items():
        print(f"{name}: {error}", file=sys.stderr)
    return 1 if failures else 0


def default_split(corpus: str) -> str | None:
    """Return "test" if the corpus has that split, otherwise None, for which `open_corpus` takes the only split."""
    from dali_llava.processing.corpora import configuration_of

    return "test" if not is_shards(corpus) and "test" in configuration_of(corpus).splits else None


def check_rows(rows, modalities: list[str], corpus: str) -> None:
    """
    Check, before a model is loaded, that all clips have captions and the media of the modalities.

    Raises:
        ValueError: if clips lack captions or media.
    """
    for column, what, wanted, remedy in (
        ("captions", "captions to score with", True, "use a split with captions"),
        ("frames", "pictures", {"image", "audiovisual"} & set(modalities), "use --modality audio"),
        ("audio", "sound", {"audio", "audiovisual"} & set(modalities), "use --modality image"),
    ):
        lacking = [row["id"] for row in rows.select_columns(["id", column]) if not row[column]] if wanted else []
        if lacking:
            first = f"{len(lacking)} of {len(rows)} clips have no {what}, the first {lacking[0]!r}"
            raise ValueError(f"{corpus}: {first}; {remedy}")
