"""
Stage 1b of DALI: align the audio tokens of a clip with its image tokens. Uses no text and no negatives.

Loads the two towers only, and trains the audio tower (86M parameters at full size).

    accelerate launch train/align.py train/configs/avworld/align.yaml \
        --base_model runs/prefix --output_dir runs/mmd --objective mmd
"""

import inspect

import torch
from transformers import set_seed

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioTowers
from dali_llava.train.arguments import AlignmentArguments
from dali_llava.train.base_model import check_base, load_base, whole_weights
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.collators import AlignmentCollator
from dali_llava.train.data.corpus import check_pictures, evaluation_rows, open_rows, shuffled, store_features
from dali_llava.train.data.draws import Draws
from dali_llava.train.losses import LOSSES, AlignmentLoss, TransportLoss
from dali_llava.train.planning import StageModel, check_memory
from dali_llava.train.trainers import AlignmentModel, AlignmentTrainer
from dali_llava.train.trainers.checkpoints import check_resume


def parse(argv: list[str] | None = None) -> AlignmentArguments:
    return parse_stage_arguments(AlignmentArguments, __doc__, argv)


def check_objective(arguments: AlignmentArguments, config: LlavaAudioConfig) -> None:
    """
    Check the objective and its options before weights are loaded.

    Args:
        arguments: arguments of the stage.
        config: configuration of the base model.

    Raises:
        ValueError: if the objective or an option is unknown, a value is invalid, or a stream lacks `schedule_epochs`.
    """
    if arguments.objective not in LOSSES:
        raise ValueError(f"unknown objective '{arguments.objective}'; known: {', '.join(LOSSES)}.")
    loss = LOSSES[arguments.objective]
    known = set(inspect.signature(loss).parameters)
    unknown = sorted(set(arguments.objective_options) - known)
    if unknown:
        raise ValueError(
            f"objective {arguments.objective}: unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}."
        )
    if arguments.transport_micro_batches < 1:
        raise ValueError(f"transport_micro_batches: must be at least 1, not {arguments.transport_micro_batches}.")
    if arguments.transport_micro_batches > 1 and not issubclass(loss, TransportLoss):
        raise ValueError(
            f"transport_micro_batches: objective {arguments.objective} solves no transport; remove the argument."
        )
    if arguments.streaming and hasattr(loss, "set_epoch") and arguments.schedule_epochs is None:
        raise ValueError("streaming: a stream has no epochs; give those of the objective, --schedule_epochs N.")
    with whole_weights(), torch.device("meta"):
        build_objective(arguments, LlavaAudioTowers(config))


def build_objective(arguments: AlignmentArguments, towers: LlavaAudioTowers) -> AlignmentLoss:
    """Build the objective that the arguments name for the tokens of the towers."""
    try:
        return LOSSES[arguments.objective].from_captioner(towers, **arguments.objective_options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective {arguments.objective}: {error}") from error


def stage_model(arguments: AlignmentArguments, config: LlavaAudioConfig) -> StageModel:
    """What the stage loads and trains; see `StageModel`. Raises the errors of `check_objective`."""
    check_objective(arguments, config)

    def add_objective(towers: LlavaAudioTowers) -> AlignmentModel:
        return AlignmentModel(towers, build_objective(arguments, towers), arguments.transport_micro_batches)

    cached = arguments.cache_features != "none"
    return StageModel(
        LlavaAudioTowers,
        trained=("audio_tower",),
        samples=(("image_tokens" if cached else "image", "audio"),),
        finish=add_objective,
        freed=("vision_tower",) if cached else (),
    )


def main(argv: list[str] | None = None) -> AlignmentTrainer:
    arguments = parse(argv)
    check_resume(arguments, f"align:{arguments.objective}")
    set_seed(arguments.seed)
    config = check_base(arguments, after=("prefix",))
    stage = stage_model(arguments, config)
    check_memory(arguments, stage, config)
    rows = open_rows(arguments, pictures=True)
    held_out = evaluation_rows(arguments)
    if held_out is not None:
        check_pictures(held_out, arguments, arguments.eval_split)
    towers, processor = load_base(arguments, stage.model_class, trained=stage.trained)
    model = stage.select(towers)
    frame = arguments.frame
    if arguments.cache_features != "none":
        rows = store_features(rows, towers, processor, arguments)
        if held_out is not None:
            held_out = store_features(held_out, towers, processor, arguments, arguments.eval_split)
        frame = None  # the only one that is stored, if the arguments select one
        stage.free(towers)
    return AlignmentTrainer(
        model=model,
        args=arguments,
        train_dataset=shuffled(rows, arguments),
        eval_dataset=held_out,
        data_collator=AlignmentCollator(
            processor,
            arguments.augmentation(),
            frame,
            ClipOpener(rows),
            Draws(arguments.seed, arguments.streaming),
        ),
        processing_class=processor,
        stage=f"align:{arguments.objective}",
    ).train_and_save()


if __name__ == "__main__":
    run_stage(main)
