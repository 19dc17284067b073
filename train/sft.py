"""
Supervised fine-tuning on the captions of a corpus, from audio, image or both, with the `SFTTrainer` of TRL.

In each epoch, a random caption of each clip is the answer to the question `prompt`. The loss covers the answers only.
The prefix follows the media where `prefix_modalities` of the base model says so, in training as in captioning. By
default, the audio projector alone is trained; `train_parts` selects other parts, and `--lora` adds adapters.

    accelerate launch train/sft.py train/configs/avworld/sft.yaml \
        --base_model runs/mmd --output_dir runs/mmd-supervised
"""

from collections.abc import Sequence
from functools import partial

from datasets import Dataset
from transformers import set_seed

from dali_llava.modeling import (
    LlavaAudioConfig,
    LlavaAudioForConditionalGeneration,
    LlavaAudioOnlyForConditionalGeneration,
)
from dali_llava.train.adapters import adapter_config, add_adapter
from dali_llava.train.base_model import check_base, load_base
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.collators import MODALITIES, SupervisedCollator, row_modalities
from dali_llava.train.data.corpus import load_rows
from dali_llava.train.data.draws import Draws
from dali_llava.train.planning import StageModel, check_memory
from dali_llava.train.trainers.checkpoints import check_resume


# part of the captioner -> modalities that use it
PARTS = {
    "audio_projector": ("audio", "audiovisual"),
    "audio_tower": ("audio", "audiovisual"),
    "multi_modal_projector": ("image", "audiovisual"),
    "language_model": tuple(MODALITIES),
    "prefix": ("audio", "audiovisual"),
}


def parse(argv: list[str] | None = None):
    from dali_llava.train.trainers.supervised import SupervisedArguments

    return parse_stage_arguments(SupervisedArguments, __doc__, argv)


def stage_model(arguments, config: LlavaAudioConfig) -> StageModel:
    """What the stage loads and trains; see `StageModel`. Raises the errors of `check_parts` and `adapter_config`."""
    check_parts(arguments, config)
    heard_only = arguments.modalities == ["audio"]
    return StageModel(
        LlavaAudioOnlyForConditionalGeneration if heard_only else LlavaAudioForConditionalGeneration,
        trained=tuple(trained_modules(arguments.train_parts)),
        samples=tuple(
            MODALITIES[name] + (("prefix",) if name in config.prefix_modalities else ())
            for name in arguments.modalities
        ),
        finish=partial(add_adapter, config=adapter_config(arguments, config), seed=arguments.seed),
    )


def main(argv: list[str] | None = None):
    from dali_llava.train.trainers.supervised import SupervisedTrainer

    arguments = parse(argv)
    check_resume(arguments, "sft")
    set_seed(arguments.seed)
    config = check_base(arguments)
    stage = stage_model(arguments, config)
    check_memory(arguments, stage, config)
    rows = captioned_rows(arguments, arguments.split)
    evaluated = captioned_rows(arguments, arguments.eval_split) if arguments.eval_split else None
    captioner, processor = load_base(arguments, stage.model_class, stage.trained)
    return SupervisedTrainer(
        model=stage.select(captioner),
        args=arguments,
        train_dataset=rows,
        eval_dataset=evaluated,
        data_collator=SupervisedCollator(
            processor,
            arguments.prompt,
            arguments.modalities,
            frame=arguments.frame,
            opener=ClipOpener(rows),
            draws=Draws(arguments.seed),
        ),
        processing_class=processor,
        stage="sft",
    ).train_and_save()


def check_parts(arguments, config: LlavaAudioConfig) -> None:
    """
    Check that the modalities use the parts to train.

    Args:
        arguments: arguments of the stage.
        config: configuration of the base model.

    Raises:
        ValueError: a modality or a part is unknown, or no modality uses a part.
    """
    for name, known in (("modalities", MODALITIES), ("train_parts", PARTS)):
        if unknown := sorted(set(getattr(arguments, name)) - set(known)):
            raise ValueError(f"{name}: unknown {', '.join(unknown)}; choose from {', '.join(known)}.")
    users = PARTS | {"prefix": [name for name in PARTS["prefix"] if name in config.prefix_modalities]}
    for field in ("train_parts", "lora"):
        for part in getattr(arguments, field) or ():
            if part in users and not set(users[part]) & set(arguments.modalities):
                raise ValueError(
                    f"{field}: {', '.join(arguments.modalities)} does not use the {part} of {arguments.base_model}; "
                    f"add one of the modalities {', '.join(users[part]) or '(none)'}, or train other parts."
                )


def captioned_rows(arguments, split: str) -> Dataset:
    """
    Load the rows of a split and check that each has a caption and media.

    Raises:
        ValueError: as in `load_rows`, or if a row has no caption, or no media of any of the modalities.
    """
    rows = load_rows(arguments, split)
    bare, unusable = [], []
    for row in rows.select_columns(["id", "captions", "audio", "frames"]):
        if not row["captions"]:
            bare.append(row["id"])
        if not row_modalities(row, arguments.modalities):
            unusable.append(row["id"])
    place = f"{arguments.dataset}, split {split}"
    if len(bare) == len(rows):
        raise ValueError(
            f"{place}: no captions; use a corpus or a split with captions, or train with train/distill.py."
        )
    for names, lack in ((bare, "caption"), (unusable, f"media for {' or '.join(arguments.modalities)}")):
        if names:
            raise ValueError(
                f"{place}: {len(names)} of {len(rows)} clips have no {lack}, the first is {names[0]}; add it, or "
                "remove these clips from the corpus."
            )
    return rows


def trained_modules(parts: Sequence[str]) -> list[str]:
    """Return the names of the modules of the parts. The head belongs to the language model."""
    return [f"model.{part}" for part in parts] + (["lm_head"] if "language_model" in parts else [])


if __name__ == "__main__":
    run_stage(main)
