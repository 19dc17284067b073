"""
Stage 1b of DALI: align the audio tower's tokens with the image tokens of the same clip. No text, no negatives.

Only the audio tower trains (86M parameters at full size).

    accelerate launch train/align.py train/configs/avworld/align.yaml \
        --base_model runs/prefix --output_dir runs/mmd --objective mmd
"""

import inspect

from transformers import set_seed

from dali_llava.train.arguments import AlignmentArguments
from dali_llava.train.base_model import check_base, load_base
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.collators import AlignmentCollator
from dali_llava.train.data.corpus import open_rows, shuffled, with_features
from dali_llava.train.losses import LOSSES
from dali_llava.train.trainers import AlignmentModel, AlignmentTrainer


def check_objective(arguments: AlignmentArguments) -> None:
    """ValueError for an objective or an option that there is not, or a schedule without epochs."""
    if arguments.objective not in LOSSES:
        raise ValueError(f"unknown objective '{arguments.objective}'; there are {', '.join(LOSSES)}.")
    loss = LOSSES[arguments.objective]
    known = set(inspect.signature(loss).parameters)
    unknown = sorted(set(arguments.objective_options) - known)
    if unknown:
        raise ValueError(
            f"objective {arguments.objective}: unknown option {', '.join(unknown)}; there are {sorted(known)}."
        )
    if arguments.streaming and hasattr(loss, "set_epoch") and arguments.schedule_epochs is None:
        raise ValueError("streaming: a stream has no epochs; name those of the objective's schedule, schedule_epochs.")


def build_objective(arguments: AlignmentArguments, width: int):
    """The objective that the arguments name, for tokens `width` wide."""
    loss, options = LOSSES[arguments.objective], arguments.objective_options
    return loss(**({"width": width, **options} if "width" in inspect.signature(loss).parameters else options))


def main(argv: list[str] | None = None) -> AlignmentTrainer:
    arguments = parse_stage_arguments(AlignmentArguments, __doc__, argv)
    set_seed(arguments.seed)
    check_objective(arguments)
    check_base(arguments, after=("prefix",))
    rows = open_rows(arguments, pictures=True)
    captioner, processor = load_base(arguments)
    objective = build_objective(arguments, captioner.config.audio_config.output_size)
    if arguments.cache_features:
        rows = with_features(rows, captioner, processor)
    trainer = AlignmentTrainer(
        model=AlignmentModel(captioner, objective),
        args=arguments,
        train_dataset=shuffled(rows, arguments),
        data_collator=AlignmentCollator(processor, arguments.augmentation(), arguments.frame, opener=ClipOpener(rows)),
        processing_class=processor,
        stage=f"align:{arguments.objective}",
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    run_stage(main)
