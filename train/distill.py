"""
Stage 2 of DALI: distillation of captions generated from audio and image into the audio projector.

The aligned captioner first samples a caption for each clip of the split from its image and audio, with the prefix. All
ranks caption. The captions are saved in `OUTPUT_DIR/pseudo_captions.parquet` and reused when the stage is run again.
The audio projector alone is then trained to generate them from audio only, without image, prefix or vision tower.
`--lora` adds adapters to the language model or the audio tower and trains them too.

    accelerate launch train/distill.py train/configs/avworld/distill.yaml \
        --base_model runs/mmd --output_dir runs/mmd-distilled
"""

import logging
from functools import partial

from transformers import set_seed

from dali_llava.modeling import (
    LlavaAudioConfig,
    LlavaAudioOnlyForConditionalGeneration,
)
from dali_llava.train.adapters import adapter_config, add_adapter
from dali_llava.train.arguments import DistillationArguments
from dali_llava.train.base_model import check_base, load_base
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.captioned import with_references
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.collators import CaptionCollator
from dali_llava.train.data.corpus import evaluation_rows, load_rows
from dali_llava.train.data.draws import Draws
from dali_llava.train.data.pseudo_captions import PseudoCaptions
from dali_llava.train.planning import StageModel, check_memory
from dali_llava.train.trainers import CaptioningTrainer
from dali_llava.train.trainers.checkpoints import check_resume


logger = logging.getLogger(__name__)


def parse(argv: list[str] | None = None) -> DistillationArguments:
    return parse_stage_arguments(DistillationArguments, __doc__, argv)


def stage_model(arguments: DistillationArguments, config: LlavaAudioConfig) -> StageModel:
    """What the stage loads and trains after captioning; see `StageModel`. Raises the errors of `adapter_config`."""
    return StageModel(
        LlavaAudioOnlyForConditionalGeneration,
        trained=("model.audio_projector",),
        samples=(("audio",),),
        finish=partial(add_adapter, config=adapter_config(arguments, config), seed=arguments.seed),
    )


def main(argv: list[str] | None = None) -> CaptioningTrainer:
    arguments = parse(argv)
    check_resume(arguments, "distill")
    set_seed(arguments.seed)
    config = check_base(arguments, after=("prefix", "align"))
    stage = stage_model(arguments, config)
    check_memory(arguments, stage, config)
    rows = load_rows(arguments)
    held_out = evaluation_rows(arguments)
    pseudo_captions = PseudoCaptions(arguments, rows)
    found = pseudo_captions.find()
    complete = arguments.captions is not None or set(rows["id"]) <= set(found)
    if not complete:
        captioner, processor = load_base(arguments, trained=stage.trained)
        found = pseudo_captions.generate(captioner, processor, found)
        del captioner.model.vision_tower  # the training needs audio only
    captions = {name: found[name].caption for name in rows["id"] if name in found and found[name].caption}
    source = arguments.captions or arguments.base_model
    if not captions:
        raise ValueError(f"{source}: no captions for {arguments.dataset}, split {arguments.split}.")
    if arguments.captions is not None and len(captions) < len(rows):
        logger.warning("%s: no captions for %d of %d clips", source, len(rows) - len(captions), len(rows))
    if complete:
        captioner, processor = load_base(arguments, stage.model_class, stage.trained)
    rows = rows.filter(lambda name: name in captions, input_columns="id")
    rows = rows.map(lambda row: {"question": arguments.prompt, "answer": captions[row["id"]]})
    captioner = stage.select(captioner)
    captioner.config.prefix_modalities = ["audiovisual"]  # audio alone is now captioned without prefix
    return CaptioningTrainer(
        model=captioner,
        args=arguments,
        train_dataset=rows,
        eval_dataset=None if held_out is None else with_references(held_out, arguments, arguments.eval_split),
        data_collator=CaptionCollator(processor, audio=True, opener=ClipOpener(rows), draws=Draws(arguments.seed)),
        processing_class=processor,
        stage="distill",
    ).train_and_save()


if __name__ == "__main__":
    run_stage(main)
