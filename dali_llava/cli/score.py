"""Score captions against references, with 95% intervals over the clips.

Both files are CSV (`id,caption`, or `id,caption_1,...,caption_n` for references) or JSON lines ({"id": ..., "caption":
...}, or {"id": ..., "captions": [...]} for references). References may also be the published CSV of Clotho, with file
names as ids (the suffix is optional), or of AudioCaps, with ids YOUTUBEID_START as in `dali-llava evaluate`. For other
columns, use --id-column. A metric that cannot run on this machine is null, with the reason. Prints the scores as JSON.
The file also has the scores of every clip, for `dali-llava compare`.

examples:
  dali-llava score --candidates captions.csv --references audiocaps/test.csv --out scores.json
  dali-llava score --candidates captions.csv --references audiocaps/test.csv --metrics cider_d,fense --out scores.json
"""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument(
        "--candidates", required=True, metavar="FILE", help="captions to score, one per clip, as CSV or JSON lines"
    )
    parser.add_argument("--references", required=True, metavar="FILE", help="reference captions, as CSV or JSON lines")
    parser.add_argument(
        "--id-column",
        metavar="NAME",
        help="column of the references with the ids of the candidates; default: id, file_name, or youtube_id with "
        "start_time (AudioCaps)",
    )
    parser.add_argument("--out", required=True, metavar="FILE.json", help="file to write the scores to")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="score only clips with a candidate and print how many have none; for clips deleted from YouTube",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,...",
        help="bleu_1, bleu_4, meteor, rouge_l, cider_d, spice and spider (the default), spider_fl, fense, sbert_sim, "
        "vocabulary",
    )
    parser.add_argument(
        "--corenlp", metavar="DIR", help="folder of Stanford CoreNLP 3.6.0, for SPICE; default: $CORENLP_HOME"
    )
    parser.add_argument(
        "--sentence-model",
        metavar="MODEL",
        help="folder or Hub id of a model of sentence-transformers, for sbert_sim and fense; default: FENSE's",
    )
    parser.add_argument(
        "--fluency-model",
        metavar="MODEL",
        help="path or name of a detector of fluency errors, for fense and spider_fl; default: FENSE's base",
    )


def run(args: argparse.Namespace) -> int:
    """Score `args.candidates` against `args.references`. Write and print the scores, and return 0."""
    from rich.console import Console

    from dali_llava.eval.caption_files import read_candidates, read_references
    from dali_llava.eval.caption_metrics import CAPTION_METRICS, CaptionScorer, check_ids
    from dali_llava.eval.metrics.sentence_models import FLUENCY_MODEL, SENTENCE_MODEL
    from dali_llava.eval.score_files import score_record, write_scores

    out = Path(args.out)
    if out.is_dir():
        raise IsADirectoryError(f"{out}: is a folder; give --out a file name")
    candidates = read_candidates(args.candidates)
    references = read_references(args.references, args.id_column)
    missing = [clip for clip in references if clip not in candidates]
    if args.allow_missing and 0 < len(missing) < len(references):
        print(f"{len(missing)} of {len(references)} clips have no candidate and are left out", file=sys.stderr)
        references = {clip: captions for clip, captions in references.items() if clip in candidates}
    try:
        check_ids(candidates, references)
    except ValueError as error:
        hint = ", or pass --allow-missing" if 0 < len(missing) < len(references) else ""
        if len(missing) == len(references):
            example = f"such as {next(iter(candidates))!r} and {next(iter(references))!r}"
            hint = f"; no id is in both, {example}; pass the column of the references with the ids as --id-column"
        raise ValueError(f"{args.candidates} against {args.references}: {error}{hint}") from error
    with (
        CaptionScorer(
            corenlp=args.corenlp,
            metrics=CAPTION_METRICS if args.metrics is None else args.metrics.split(","),
            sentence_model=args.sentence_model or SENTENCE_MODEL,
            fluency_model=args.fluency_model or FLUENCY_MODEL,
        ) as scorer,
        Console(stderr=True).status(f"scoring {len(candidates)} captions"),
    ):
        scored = scorer.score(candidates, references)
    record = {"candidates": args.candidates, "references": args.references, "missing": len(missing)}
    record |= score_record(scored, references, scorer.tokenizer)
    write_scores(out, record)
    of_clips = ("references_digest", "clips", "statistics")
    shown = {name: value for name, value in record.items() if name not in of_clips}
    print(json.dumps(shown, indent=2, ensure_ascii=False))
    return 0
