"""
Before DALI: train AVWorld's image captioner from scratch, on pictures and text only.

The audio tower, the audio projector and the prefix keep their initial weights.

    accelerate launch train/avworld/pretrain_captioner.py train/configs/avworld/captioner.yaml \
        --output_dir runs/captioner
"""

import math
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, set_seed

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.processing import LlavaAudioFeatureExtractor, LlavaAudioProcessor
from dali_llava.processing.chat_templates import PLAIN_CHAT_TEMPLATE
from dali_llava.processing.corpora.avworld.vocabulary import build_tokenizer
from dali_llava.train.arguments import StageArguments
from dali_llava.train.avworld.token_views import TokenViewCollator, TokenViewTrainer
from dali_llava.train.avworld.unlikelihood import seldom_repeated
from dali_llava.train.avworld.words import WordCollator, WordTrainer
from dali_llava.train.base_model import train_only, whole_weights
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.clips import open_frame
from dali_llava.train.data.collators import pixel_values
from dali_llava.train.data.corpus import load_rows
from dali_llava.train.data.draws import Draws
from dali_llava.train.engines import requested_engine
from dali_llava.train.trainers.checkpoints import check_resume


@dataclass
class CaptionerArguments(StageArguments):
    """Arguments of the captioner's training: its architecture and the settings of both steps."""

    _VALID_DICT_FIELDS = [*StageArguments._VALID_DICT_FIELDS, "vision_config", "text_config", "audio_config"]

    vision_config: dict | str | None = field(default=None, metadata={"help": "Vision tower's configuration, as JSON."})
    text_config: dict | str | None = field(default=None, metadata={"help": "Language model's configuration, as JSON."})
    audio_config: dict | str | None = field(default=None, metadata={"help": "Audio tower's configuration, as JSON."})
    audio_mean: float | None = field(
        default=None, metadata={"help": "Mean of the log-mel spectrograms; by default that of the audio tower."}
    )
    audio_std: float | None = field(
        default=None, metadata={"help": "Standard deviation of the log-mel spectrograms; by default as audio_mean."}
    )
    vision_steps: int = field(default=300, metadata={"help": "Training steps of the vision tower."})
    vision_batch_size: int = field(default=64, metadata={"help": "Number of pictures per step of the vision tower."})
    vision_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of the vision tower."})
    unlikelihood: float = field(default=2.0, metadata={"help": "Weight of the unlikelihood loss of repeated words."})
    split: str = field(default="captioner", metadata={"help": "Split with pictures and dialogues."})


def build_captioner(arguments: CaptionerArguments) -> tuple[LlavaAudioForConditionalGeneration, LlavaAudioProcessor]:
    """Build the captioner that the arguments describe, with random weights, and its processor."""
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
    statistics = {"mean": arguments.audio_mean, "std": arguments.audio_std}
    statistics = {name: value for name, value in statistics.items() if value is not None}
    side = vision["image_size"]
    processor = LlavaAudioProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        feature_extractor=LlavaAudioFeatureExtractor(**config.audio_config.feature_extractor_kwargs | statistics),
        patch_size=vision["patch_size"],
        prefix_length=config.prefix_length,
        chat_template=PLAIN_CHAT_TEMPLATE,
    )
    with whole_weights():
        captioner = LlavaAudioForConditionalGeneration(config)
    if arguments.attn_implementation is not None:
        captioner.set_attn_implementation(arguments.attn_implementation)
    return captioner, processor


def tokenize_dialogues(rows: Dataset, processor: LlavaAudioProcessor) -> Dataset:
    """
    Tokenize dialogues.

    Args:
        rows: rows with `id`, `frames` and a list of `dialogues`.
        processor: processor of the captioner.

    Returns:
        one row per turn of a dialogue, with `id`, `pictures` (indices of its frames, counted over all rows),
        `prompt_ids` and `answer_ids`.
    """
    tokenizer = processor.tokenizer
    first = [0, *accumulate(len(frames) for frames in rows["frames"])]

    def split(batch: dict, indices: list[int]) -> dict:
        names = [
            f"{name}/{turn}"
            for name, dialogue in zip(batch["id"], batch["dialogues"], strict=True)
            for turn in range(len(dialogue))
        ]
        turns = [
            (list(range(first[index], first[index + 1])), turn["question"], turn["answer"])
            for index, dialogue in zip(indices, batch["dialogues"], strict=True)
            for turn in dialogue
        ]
        texts = [processor.format_prompt(q, image=bool(shown), answer=answer) for shown, q, answer in turns]
        asked = dict.fromkeys((bool(shown), question) for shown, question, _ in turns)  # tokenizes each question once
        prompts = [processor.format_prompt(question, image=shown) for shown, question in asked]
        ids_of = dict(zip(asked, tokenizer(prompts)["input_ids"], strict=True))
        prompt_ids = [ids_of[bool(shown), question] for shown, question, _ in turns]
        answer_ids = [
            ids[len(prompt) :] for ids, prompt in zip(tokenizer(texts)["input_ids"], prompt_ids, strict=True)
        ]
        pictures = [shown for shown, *_ in turns]
        return {"id": names, "pictures": pictures, "prompt_ids": prompt_ids, "answer_ids": answer_ids}

    columns = rows.column_names
    return rows.map(split, batched=True, with_indices=True, remove_columns=columns, desc="Dialogues")


@torch.no_grad()
def encode_pictures(captioner, processor, rows: Dataset, batch_size: int = 256) -> torch.Tensor:
    """Return the image tokens (frames, N, vision width) of all frames of all rows, in order."""
    tower, tokens = captioner.model.eval(), []
    for batch in tqdm(rows.iter(batch_size), total=math.ceil(len(rows) / batch_size), desc="Image tokens", delay=2):
        pictures = [open_frame({"frames": frames}, i) for frames in batch["frames"] for i in range(len(frames))]
        if pictures:
            tokens.append(tower.encode_image(pixel_values(pictures, processor).to(captioner.device)).float().cpu())
    return torch.cat(tokens)


def vision_arguments(arguments: CaptionerArguments) -> CaptionerArguments:
    """Return the arguments of the first step, whose checkpoints are in `OUTPUT_DIR/vision`."""
    return replace(
        arguments,
        output_dir=str(Path(arguments.output_dir) / "vision"),
        max_steps=arguments.vision_steps,
        per_device_train_batch_size=arguments.vision_batch_size,
        learning_rate=arguments.vision_learning_rate,
        resume_from_checkpoint="true" if arguments.resume_from_checkpoint else None,
    )


def pretrain_vision(captioner, processor, rows: Dataset, arguments: CaptionerArguments) -> WordTrainer:
    """Train the vision tower, the projector and the word embeddings to predict nouns from image tokens."""
    model = captioner.model
    train_only(captioner, model.vision_tower, model.multi_modal_projector, captioner.lm_head)
    trainer = WordTrainer(
        model=captioner,
        pretrained=captioner,
        stage="vision",
        args=arguments,
        train_dataset=rows.filter(lambda frames: len(frames) == 1, input_columns="frames", desc="Pictures"),
        data_collator=WordCollator(processor, Draws(arguments.seed)),
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    return trainer


def main(argv: list[str] | None = None) -> WordTrainer | TokenViewTrainer:
    arguments = parse_stage_arguments(CaptionerArguments, __doc__, argv)
    if (engine := requested_engine(arguments)) != "one process":
        raise ValueError(f"{engine}: the captioner of AVWorld is small and trains in one process; --num_processes 1.")
    first = vision_arguments(arguments)
    check_resume(first, "vision")
    check_resume(arguments, "captioner")
    set_seed(arguments.seed)
    captioner, processor = build_captioner(arguments)
    model = captioner.model
    rows = load_rows(arguments)
    vision = pretrain_vision(captioner, processor, rows, first)
    if vision.interruption.requested:
        return vision
    set_seed(arguments.seed)  # the second step is the same if the first one has been resumed
    train_only(captioner, model.multi_modal_projector, model.language_model, captioner.lm_head)
    extractor = processor.feature_extractor
    heard = extractor.num_audio_tokens(extractor.max_length)
    dialogues = tokenize_dialogues(rows, processor)
    trainer = TokenViewTrainer(
        model=captioner,
        args=arguments,
        train_dataset=dialogues,
        data_collator=TokenViewCollator(
            processor, encode_pictures(captioner, processor, rows), (heard // 2, heard), Draws(arguments.seed)
        ),
        processing_class=processor,
        stage="captioner",
        unlikelihood=arguments.unlikelihood,
        words=seldom_repeated(dialogues["answer_ids"], len(processor.tokenizer)),
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if not trainer.interruption.requested:
        model.copy_image_projector()
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    run_stage(main)
