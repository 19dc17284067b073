"""
Supervised fine-tuning on the captions of a corpus, from audio, image or both, with the `SFTTrainer` of TRL.

In each epoch, a random caption of each clip is the answer to the question `prompt`. The loss covers the answers only.
The prefix follows the media where `prefix_modalities` of the base model says so, in training as in captioning. By
default, the audio projector alone is trained; `train_parts` selects other parts, and `--lora` adds adapters.

    accelerate launch train/sft.py train/configs/avworld/sft.yaml \
        --base_model runs/mmd --output_dir runs/mmd-supervised
"""

from functools import partial

from transformers import set_seed

from dali_llava.modeling import (
    LlavaAudioConfig,
    LlavaAudioForConditionalGeneration,
    LlavaAudioOnlyForConditionalGeneration,
)
from dali_llava.train.adapters import adapter_config, add_adapter
from dali_llava.train.base_model import check_base, load_base
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.captioned import captioned_rows
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.collators import MODALITIES, SupervisedCollator
from dali_llava.train.data.draws import Draws
from dali_llava.train.parts import check_parts, trained_modules
from dali_llava.train.planning import StageModel, check_memory
from dali_llava.train.trainers.checkpoints import check_resume


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


if __name__ == "__main__":
    run_stage(main)
