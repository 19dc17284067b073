"""
Stage 2 of DALI: distillation of captions generated from audio and image into the audio projector.

The aligned captioner first samples a caption for each clip of the split from its image and audio, with the prefix. The
captions are saved in `OUTPUT_DIR/pseudo_captions.jsonl` and reused when the stage is run again. The audio projector
alone is then trained to generate them from audio only, without image or prefix.

    accelerate launch train/distill.py train/configs/avworld/distill.yaml \
        --base_model runs/mmd --output_dir runs/mmd-distilled
"""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from transformers import set_seed

from dali_llava.eval.runner import CaptionRunner, Sample
from dali_llava.processing.corpora.rows import open_audio, open_middle_frame
from dali_llava.train.arguments import DistillationArguments
from dali_llava.train.base_model import check_base, load_base, train_only
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.collators import CaptionCollator
from dali_llava.train.data.corpus import load_rows
from dali_llava.train.trainers import CaptioningTrainer
from dali_llava.train.trainers.checkpoints import check_resume


logger = logging.getLogger(__name__)


def pseudo_caption(captioner, processor, rows, arguments: DistillationArguments) -> dict[str, str]:
    """Caption `rows` from image, audio and prefix, and return captions by id. Captions on disk are reused."""

    def samples() -> Iterator[Sample]:
        for row in rows:
            media = {"image": partial(open_middle_frame, row), "audio": partial(open_audio, row)}
            yield Sample(id=row["id"], prompt=arguments.prompt, prefix=True, **media)

    runner = CaptionRunner(
        captioner,
        processor,
        batch_size=arguments.caption_batch_size,
        max_new_tokens=arguments.caption_max_new_tokens,
        do_sample=arguments.caption_temperature > 0,
        temperature=arguments.caption_temperature or None,
    )
    results = list(runner.run(samples(), out=Path(arguments.output_dir) / "pseudo_captions.jsonl", total=len(rows)))
    failed = [result for result in results if result.error is not None]
    if failed:
        logger.warning(
            "%d of %d clips could not be captioned; first error: %s", len(failed), len(rows), failed[0].error
        )
    return {result.id: result.caption for result in results if result.caption}


def main(argv: list[str] | None = None) -> CaptioningTrainer:
    arguments = parse_stage_arguments(DistillationArguments, __doc__, argv)
    check_resume(arguments, "distill")
    set_seed(arguments.seed)
    check_base(arguments, after=("prefix", "align"))
    rows = load_rows(arguments)
    captioner, processor = load_base(arguments)
    with arguments.main_process_first(desc="pseudo-captions"):
        captions = pseudo_caption(captioner, processor, rows, arguments)
    if not captions:
        raise ValueError(f"{arguments.base_model}: no captions for {arguments.dataset}, split {arguments.split}.")
    rows = rows.filter(lambda name: name in captions, input_columns="id")
    rows = rows.map(lambda row: {"question": arguments.prompt, "answer": captions[row["id"]]})
    train_only(captioner, captioner.model.audio_projector)
    captioner.config.prefix_modalities = ["audiovisual"]  # audio alone is now captioned without prefix
    return CaptioningTrainer(
        model=captioner,
        args=arguments,
        train_dataset=rows,
        data_collator=CaptionCollator(processor, audio=True, opener=ClipOpener(rows)),
        processing_class=processor,
        stage="distill",
    ).train_and_save()


if __name__ == "__main__":
    run_stage(main)
