"""Run the whole pipeline on the built-in AVWorld: captioner, prefix, alignment, distillation, evaluation.

Everything trains here, in minutes on two cores, through the classes and scripts of the full-size model. The captioner
is trained once and cached. Writes results.json, results.md, every caption, each stage's checkpoint, and the final
captioner in OUT/model.

examples:
  dali-llava quickstart
  dali-llava quickstart --out runs/seed1 --seed 1 --methods mmd
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path


DEFAULT_METHODS = "mmd"
BATCH_SIZE = 100
MAX_NEW_TOKENS = 32
SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dali-llava quickstart`."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the stages; default: %(default)s")
    parser.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        metavar="all|NAME,...",
        help="objectives to align with, one after the other; the last makes OUT/model; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, print and write; a claim that fails is a result, not an error."""
    from dali_llava.eval.results import Results, print_results, versions, write_results
    from dali_llava.train.losses import LOSSES

    methods = list(LOSSES) if args.methods == "all" else args.methods.split(",")
    for method in methods:
        if method not in LOSSES:
            raise ValueError(f"--methods: unknown method '{method}'; choose from all, {', '.join(LOSSES)}.")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}.")

    start = time.monotonic()
    _quieten()
    folders = train(args.out, args.seed, methods)
    rows, claims, examples = evaluate(args.out, args.seed, methods, folders)
    results = Results("avworld", time.monotonic() - start, versions(), rows, claims)
    write_results(results, args.out)
    print_results(results)
    print_examples(examples)
    print(f"\nwritten: {args.out}/results.md, {args.out}/model\nnext:    dali-llava caption {args.out}/model FILE ...")
    return 0


def announce(text: str) -> None:
    """A headline of the run, on stderr."""
    from rich.console import Console

    Console(stderr=True).rule(f"[bold]{text}", align="left")


def train(out: Path, seed: int, methods: list[str]) -> dict[str, Path]:
    """All stages; the folder of each checkpoint by name: captioner, prefix, METHOD-aligned, METHOD-distilled."""
    from dali_llava.train import align, distill, prefix_tune
    from dali_llava.train.captioner_cache import pretrained_captioner
    from dali_llava.train.configuration import CONFIGS

    configs = CONFIGS / "avworld"
    folders = {"captioner": out / "captioner", "prefix": out / "prefix"}

    announce("captioner: an image captioner, from scratch (cached)")
    shutil.copytree(pretrained_captioner(configs / "captioner.yaml"), folders["captioner"], dirs_exist_ok=True)

    def stage(main, config: str, base: str, name: str, *words: str) -> None:
        folders[name] = out / name
        paths = ["--base_model", str(folders[base]), "--output_dir", str(folders[name])]
        main([str(configs / config), *paths, "--seed", str(seed), *words])

    announce("prefix: 16 pictures with a caption of their sound")
    stage(prefix_tune.main, "prefix_tune.yaml", "captioner", "prefix")
    for method in methods:
        announce(f"{method}: audio tokens onto image tokens")
        stage(align.main, "align.yaml", "prefix", f"{method}-aligned", "--objective", method)
        announce(f"{method}: captions from sound and picture, distilled into the audio projector")
        stage(distill.main, "distill.yaml", f"{method}-aligned", f"{method}-distilled")
    return folders


def evaluate(out: Path, seed: int, methods: list[str], folders: dict[str, Path]):
    """Rows, claims, and captions to show: caption `test` and `test_shifted` with every system, and score them."""
    from dali_llava.eval import claims as check
    from dali_llava.eval.caption_metrics import CaptionScorer
    from dali_llava.eval.evaluation import System, caption_split, score_split
    from dali_llava.eval.runner import CaptionRunner
    from dali_llava.eval.source_metrics import visual_bias
    from dali_llava.modeling import LlavaAudioForConditionalGeneration
    from dali_llava.processing import LlavaAudioProcessor
    from dali_llava.processing.corpora import load_corpus
    from dali_llava.processing.corpora.avworld import SOUND_WORDS, VISUAL_WORDS, names
    from dali_llava.processing.processing_llava_audio import SEE_PROMPT, SOUND_PROMPT

    announce("evaluation")
    processor = LlavaAudioProcessor.from_pretrained(folders["captioner"])
    splits = {split: load_corpus("avworld", split, num_proc=os.cpu_count()) for split in ("test", "test_shifted")}
    said = {split: [] for split in splits}
    bias = {}

    def runner(name: str) -> CaptionRunner:
        model = LlavaAudioForConditionalGeneration.from_pretrained(folders[name])
        return CaptionRunner(model, processor, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS)

    def ask(captioner: CaptionRunner, method: str, stage: str, modality: str, prefix: bool, split: str = "test"):
        system = System(method, stage, modality, SOUND_PROMPT, prefix)
        captioned = caption_split(captioner, splits[split], system, split, out / "captions")
        said[split].append(captioned)
        return captioned

    with CaptionScorer() as scorer:
        prefixed = runner("prefix")
        before = ask(prefixed, "image_only", "prompt", "image", prefix=False)
        ask(prefixed, "image_only", "prefix", "image", prefix=True)
        ask(prefixed, "untrained", "prefix", "audio", prefix=True)
        for method in methods:
            aligned, distilled = runner(f"{method}-aligned"), runner(f"{method}-distilled")
            for split in splits:
                ask(aligned, method, "aligned", "audio", prefix=True, split=split)
                ask(aligned, method, "aligned", "audiovisual", prefix=True, split=split)
                ask(distilled, method, "distilled", "audio", prefix=False, split=split)
                ask(distilled, method, "distilled", "audiovisual", prefix=True, split=split)
            unasked = System(method, "prompt", "audio", SEE_PROMPT, prefix=False)
            answers = caption_split(aligned, splits["test"], unasked, "test", out / "captions").captions
            bias[method] = visual_bias(list(answers.values()), sorted(VISUAL_WORDS))
        # The captioner that the run hands over, whole; and what it says of pictures after every stage.
        distilled.model.save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
        folders["model"] = out / "model"
        unchanged = System("image_only", "after", "image", SOUND_PROMPT, prefix=False)
        after = caption_split(runner("model"), splits["test"], unchanged, "test", out / "captions").captions
        rows = [row for split in splits for row in score_split(scorer, splits[split], said[split], seed, names)]

    table = {(row.method, row.stage, row.modality, row.split): row for row in rows}
    for method, value in bias.items():
        row = table[method, "aligned", "audio", "test"]
        row.metrics["visual_bias"] = value
        row.reason.pop("visual_bias", None)
    claims = [
        check.captions_are_visual(before.captions, SOUND_WORDS),
        check.prefix_turns_to_sound(table["image_only", "prefix", "image", "test"]),
        *(
            check.hears(table[method, "aligned", "audio", "test"], table["untrained", "prefix", "audio", "test"])
            for method in methods
        ),
        check.captions_unchanged(before.captions, after, "before and after all stages"),
    ]
    return rows, claims, list(show_examples(splits["test"], said["test"]))


def show_examples(rows, said) -> list[tuple[str, dict[str, str]]]:
    """The first reference of a few clips, and what each system that hears said of them."""
    for row in rows.select(range(min(SHOWN, len(rows)))):
        captions = {
            one.system.name: one.captions.get(row["id"], "-") for one in said if one.system.modality != "image"
        }
        yield row["captions"][0], captions


def print_examples(examples) -> None:
    """Captions beside their references, as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    systems = [name for name in examples[0][1] if not name.startswith("untrained")]
    table = Table("reference", *systems, title="captions beside their references", show_lines=True)
    for reference, captions in examples:
        table.add_row(reference, *(captions[name] for name in systems))
    console.print(table)


def _quieten() -> None:
    """Leave stderr to our own headlines and bars."""
    import datasets
    from transformers import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    sys.stderr.flush()
