"""
Before DALI: train a small image captioner from scratch, pictures and text only, for a corpus that has one to learn.

The captioner never hears: audio tower, audio projector and prefix keep their initial weights.

    accelerate launch train/pretrain_captioner.py train/configs/avworld/captioner.yaml --output_dir runs/captioner
"""

import math
import sys
from dataclasses import dataclass, field, replace

from datasets import Dataset
from transformers import CLIPImageProcessor, set_seed

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.processing import LlavaAudioFeatureExtractor, LlavaAudioProcessor
from dali_llava.processing.corpora.avworld.vocabulary import build_tokenizer
from dali_llava.processing.processing_llava_audio import PLAIN_CHAT_TEMPLATE
from dali_llava.train.collators import TokenViewCollator, WordCollator
from dali_llava.train.configuration import parse_stage_arguments
from dali_llava.train.corpus import load_rows
from dali_llava.train.trainers import StageArguments, TokenViewTrainer, WordTrainer, train_only


@dataclass
class CaptionerArguments(StageArguments):
    """Arguments of the captioner's training: its architecture and the training's own."""

    _VALID_DICT_FIELDS = [*StageArguments._VALID_DICT_FIELDS, "vision_config", "text_config", "audio_config"]

    vision_config: dict | str | None = field(default=None, metadata={"help": "Vision tower, as JSON."})
    text_config: dict | str | None = field(default=None, metadata={"help": "Language model, as JSON."})
    audio_config: dict | str | None = field(default=None, metadata={"help": "Audio tower, as JSON."})
    vision_steps: int = field(default=300, metadata={"help": "Steps of the vision tower, before the captioner's."})
    vision_batch_size: int = field(default=64, metadata={"help": "Pictures a step, in those."})
    vision_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate, in those."})
    split: str = field(default="captioner", metadata={"help": "Split with pictures and dialogues."})


def build_captioner(arguments: CaptionerArguments) -> tuple[LlavaAudioForConditionalGeneration, LlavaAudioProcessor]:
    """A captioner with random weights and its processor, as the arguments describe them."""
    tokenizer = build_tokenizer()
    image_id, audio_id, prefix_id = tokenizer.convert_tokens_to_ids(["<image>", "<audio>", "<prefix>"])
    vision, audio = dict(arguments.vision_config), dict(arguments.audio_config)
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **arguments.text_config,
    }
    config = LlavaAudioConfig(
        vision_config=vision,
        text_config=text,
        audio_config=audio,
        image_token_index=image_id,
        audio_token_index=audio_id,
        prefix_token_index=prefix_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    side = vision["image_size"]
    processor = LlavaAudioProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        feature_extractor=LlavaAudioFeatureExtractor(
            num_mel_bins=config.audio_config.num_mel_bins, max_length=config.audio_config.max_length
        ),
        patch_size=vision["patch_size"],
        prefix_length=config.prefix_length,
        chat_template=PLAIN_CHAT_TEMPLATE,
    )
    captioner = LlavaAudioForConditionalGeneration(config)
    return captioner, processor


def one_dialogue_a_row(rows: Dataset) -> Dataset:
    """Rows with a list of `dialogues` into rows with one `question` and `answer`."""

    def split(batch: dict) -> dict:
        pairs = [
            (frames, turn["question"], turn["answer"])
            for frames, turns in zip(batch["frames"], batch["dialogues"], strict=True)
            for turn in turns
        ]
        frames, questions, answers = zip(*pairs, strict=True)
        return {"frames": list(frames), "question": list(questions), "answer": list(answers)}

    return rows.map(split, batched=True, remove_columns=rows.column_names, desc="Dialogues")


def pretrain_vision(captioner, processor, rows: Dataset, arguments: CaptionerArguments) -> None:
    """Train vision tower, projector and word embeddings until every word is read off some image token."""
    model = captioner.model
    train_only(captioner, model.vision_tower, model.multi_modal_projector, captioner.lm_head)
    WordTrainer(
        model=captioner,
        captioner=captioner,
        stage="vision",
        args=replace(
            arguments,
            max_steps=arguments.vision_steps,
            per_device_train_batch_size=arguments.vision_batch_size,
            learning_rate=arguments.vision_learning_rate,
        ),
        train_dataset=rows.filter(lambda frames: len(frames) > 0, input_columns="frames", desc="Pictures"),
        data_collator=WordCollator(processor),
    ).train()


def main(argv: list[str] | None = None) -> TokenViewTrainer:
    arguments = parse_stage_arguments(CaptionerArguments, __doc__, argv)
    set_seed(arguments.seed)
    captioner, processor = build_captioner(arguments)
    model = captioner.model
    rows = load_rows(arguments)
    pretrain_vision(captioner, processor, rows, arguments)
    train_only(captioner, model.multi_modal_projector, model.language_model, captioner.lm_head)
    grid, heard = captioner.config.image_seq_length, math.prod(captioner.config.audio_config.grid_size)
    trainer = TokenViewTrainer(
        model=captioner,
        args=arguments,
        train_dataset=one_dialogue_a_row(rows),
        data_collator=TokenViewCollator(processor, drawn=(min(grid, heard), max(grid, heard))),
        processing_class=processor,
        stage="captioner",
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    model.copy_image_projector()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
