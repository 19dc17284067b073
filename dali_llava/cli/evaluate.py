"""Caption a test split and score the captions.

Writes the contract's results file and, beside it, every caption (OUT.captions/), from which a run that was cut short
goes on.

example:
  dali-llava evaluate runs/quickstart/model --dataset avworld --out results.json
"""

import argparse
import time
from pathlib import Path

from .loading import add_model_arguments, load_captioner


MODALITIES = ("audio", "image", "audiovisual")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dali-llava evaluate`."""
    add_model_arguments(parser)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="corpus: avworld")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument(
        "--modality",
        nargs="+",
        choices=MODALITIES,
        default=["audio", "audiovisual"],
        help="default: audio audiovisual",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where the corpus lies; AVWorld needs none")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="results file to write")


def run(args: argparse.Namespace) -> int:
    """Caption, score, print and write; 1 when a clip could not be captioned."""
    import json
    import sys

    from dali_llava.eval.caption_metrics import CaptionScorer
    from dali_llava.eval.evaluation import System, caption_split, score_split
    from dali_llava.eval.results import Results, print_results, versions, write_text
    from dali_llava.eval.runner import CaptionRunner
    from dali_llava.processing.corpora import load_corpus
    from dali_llava.processing.corpora.avworld import names
    from dali_llava.processing.processing_llava_audio import SOUND_PROMPT

    start = time.monotonic()
    if args.data_dir is not None and args.dataset == "avworld":
        raise ValueError("--data-dir: avworld is generated and has no folder; leave it out")
    rows = load_corpus(args.dataset, args.split)
    model, processor = load_captioner(args.model, args.device, args.dtype)
    runner = CaptionRunner(
        model, processor, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, num_beams=args.num_beams
    )
    stage = "distilled" if "audio" not in model.config.prefix_modalities else "aligned"
    with CaptionScorer() as scorer:
        said = []
        for modality in args.modality:
            prefix = modality in model.config.prefix_modalities
            system = System(Path(args.model).name, stage, modality, SOUND_PROMPT, prefix)
            said.append(caption_split(runner, rows, system, args.split, args.out.with_suffix(".captions")))
        table = score_split(scorer, rows, said, seed=0, names=names if args.dataset == "avworld" else None)
    results = Results(args.dataset, time.monotonic() - start, versions(), table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(results.to_dict(), indent=2, ensure_ascii=False) + "\n")
    print_results(results)
    failures = {name: error for one in said for name, error in one.failures.items()}
    for name, error in failures.items():
        print(f"{name}: {error}", file=sys.stderr)
    return 1 if failures else 0
