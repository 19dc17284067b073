"""Plan a stage: parameters, memory of a GPU, operations and hours. Reads no weights and allocates no model.

CONFIG is the configuration of a stage. The stage is the one whose name starts the name of CONFIG, or that of --stage.
Further options are fields of the stage, as in its script. Of --base_model, only the configuration is read. Without a
base model, the sizes are those of the paper, in bfloat16: CLIP ViT-L/14@336, CAV-MAE and Vicuna-7B for DALI, CLIP
ViT-L/14, CED-base and Llama-2-7B for LAVCap.

The hours are those of the arithmetic at an assumed throughput. They include neither the loading of media nor the
solver of the transport.

examples:
  dali-llava plan train/configs/full/align.yaml --objective ot_att --gpu-memory 80
  dali-llava plan train/configs/full/sft.yaml --gpus 8 --engine zero3 --per_device_train_batch_size 8
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments to its parser."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of a stage")
    _add_options(parser)


def complete_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Accept the other options in `words`: fields of the stage, which its own parser checks."""
    finder = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    _add_options(finder)
    others = [word for word in finder.parse_known_args(words)[1] if word.startswith("--")]
    for name in dict.fromkeys(word.partition("=")[0] for word in others):
        if name not in ("--help", "--debug"):
            parser.add_argument(name, nargs="+", dest=f"field {name}", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Print the plan to stdout, and the stage and its base model to stderr."""
    from dali_llava.train.planning import plan_stage
    from dali_llava.train.planning.arguments import planned_stage, stage_of
    from dali_llava.train.planning.table import format_plan

    if args.gpu_memory is not None and not args.gpu_memory > 0:
        raise ValueError(f"--gpu-memory: must be positive, not {args.gpu_memory:g}.")
    name = args.stage or stage_of(args.config)
    fields = {key.removeprefix("field "): value for key, value in vars(args).items() if key.startswith("field ")}
    words = [word for field, values in fields.items() for word in (field, *values)]
    arguments, stage, config, frames, origin = planned_stage(name, args.config, words)
    print(f"{name}; {origin}", file=sys.stderr)
    sizes = args.engine, args.gpus, args.text_tokens, args.clips, args.tflops
    plan = plan_stage(arguments, stage, config, *sizes, frames=frames)
    print(format_plan(plan, args.engine, args.gpus, args.gpu_memory, args.tflops))
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", metavar="NAME", help="prefix_tune, align, distill, sft or lavcap")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs; default: 1")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of a GPU in GB, to compare with")
    parser.add_argument(
        "--engine", default="ddp", metavar="NAME", help="ddp, zero2, zero3, zero3_offload or fsdp2; default: ddp"
    )
    parser.add_argument(
        "--clips", type=int, metavar="N", help="number of clips; default: max_samples, or that of the paper's corpus"
    )
    parser.add_argument(
        "--text-tokens", type=int, default=128, metavar="N", help="tokens of a question and its answer; default: 128"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=125.0,
        metavar="X",
        help="assumed throughput of a GPU in TFLOP/s; default: 125, 40%% of an A100",
    )
