"""
Stage 1a of DALI: learn the prefix that makes an image captioner describe sounds, from 16 images with audio captions.

Only the prefix (16 vectors) is trained.

    accelerate launch train/prefix_tune.py train/configs/avworld/prefix_tune.yaml \
        --base_model runs/captioner --output_dir runs/prefix
"""

from transformers import set_seed

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.train.arguments import PrefixArguments
from dali_llava.train.base_model import check_base, load_base
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.captioned import with_references
from dali_llava.train.data.collators import CaptionCollator
from dali_llava.train.data.corpus import evaluation_rows, load_rows
from dali_llava.train.data.draws import Draws
from dali_llava.train.planning import StageModel, check_memory
from dali_llava.train.trainers import CaptioningTrainer
from dali_llava.train.trainers.checkpoints import check_resume


def parse(argv: list[str] | None = None) -> PrefixArguments:
    return parse_stage_arguments(PrefixArguments, __doc__, argv)


def stage_model(arguments: PrefixArguments, config: LlavaAudioConfig) -> StageModel:
    """What the stage loads and trains; see `StageModel`."""
    return StageModel(LlavaAudioForConditionalGeneration, trained=("model.prefix",), samples=(("image", "prefix"),))


def main(argv: list[str] | None = None) -> CaptioningTrainer:
    arguments = parse(argv)
    check_resume(arguments, "prefix")
    set_seed(arguments.seed)
    config = check_base(arguments)
    stage = stage_model(arguments, config)
    check_memory(arguments, stage, config)
    rows = load_rows(arguments)
    if len(rows) < (arguments.max_samples or 1):
        raise ValueError(
            f"{arguments.dataset}, split {arguments.split}: {len(rows)} rows, fewer than max_samples "
            f"({arguments.max_samples}); lower max_samples or add captioned rows."
        )
    rows = with_references(rows, arguments, arguments.split)
    held_out = evaluation_rows(arguments)
    captioner, processor = load_base(arguments, trained=stage.trained)
    return CaptioningTrainer(
        model=stage.select(captioner),
        args=arguments,
        train_dataset=rows,
        eval_dataset=None if held_out is None else with_references(held_out, arguments, arguments.eval_split),
        data_collator=CaptionCollator(
            processor, image=True, prefix=True, frame=arguments.frame, draws=Draws(arguments.seed)
        ),
        processing_class=processor,
        stage="prefix",
    ).train_and_save()


if __name__ == "__main__":
    run_stage(main)
