"""
LAVCap: supervised captioning from fused audio and image tokens, with a loss that assigns them to each other.

The loss is the cross-entropy of the captions plus `ot_weight` times `TokenAssignmentLoss` between the tokens of the
encoders. `--fusion` adds a fusion to a base model without one; it starts from random weights. The vision tower is
frozen. The audio tower and the language model are frozen, adapted (`--lora`) or trained in full (`--train_parts`). The
model is saved with its prompt and its beam search. It has no prefix.

    accelerate launch train/lavcap.py train/configs/avworld/lavcap.yaml \
        --base_model runs/mmd --output_dir runs/lavcap
"""

import inspect

from torch import nn
from transformers import set_seed

from dali_llava.modeling import (
    LlavaAudioConfig,
    LlavaAudioForConditionalGeneration,
    LlavaAudioOnlyForConditionalGeneration,
)
from dali_llava.modeling.fusion import CONCATENATE
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.processing.lavcap_prompts import TRAINING_REQUESTS, lavcap_prompt
from dali_llava.train.adapters import adapter_config, add_adapter
from dali_llava.train.base_model import check_base, load_base
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.augmentation import Augmentation
from dali_llava.train.data.captioned import captioned_rows
from dali_llava.train.data.clips import ClipOpener
from dali_llava.train.data.collators import MODALITIES, SupervisedCollator
from dali_llava.train.data.draws import Draws
from dali_llava.train.losses import TokenAssignmentLoss
from dali_llava.train.parts import check_parts, trained_modules
from dali_llava.train.planning import StageModel, check_memory
from dali_llava.train.trainers.checkpoints import check_resume
from dali_llava.train.trainers.lavcap import LavcapArguments, LavcapModel, LavcapTrainer


def parse(argv: list[str] | None = None) -> LavcapArguments:
    return parse_stage_arguments(LavcapArguments, __doc__, argv)


def paper_sizes() -> tuple[LlavaAudioConfig, int]:
    """Return the configuration of a base model with the sizes of the paper, and the number of frames of a clip."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = LlavaAudioConfig(  # the sizes of Vicuna-7B are those of Llama-2-7B
        fusion="ot_attention",
        vision_pooling="frame",
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 768,
            **vision,
        },
        audio_config={"model_type": "ced_audio", "mel_pooling": True},
    )
    return config, 20


def fused_config(arguments: LavcapArguments, base: LlavaAudioConfig) -> LlavaAudioConfig:
    """
    Return the configuration of the stage: that of its base model with the fusion of the arguments, without prefix.

    Raises:
        ValueError: there is no fusion, the fusion or an option is unknown, or a new part is not trained.
    """
    changes = {"prefix_modalities": []}
    if arguments.fusion is not None:
        changes |= {"fusion": arguments.fusion, "fusion_options": arguments.fusion_options or None}
    elif arguments.fusion_options:
        raise ValueError("fusion_options: belong to a fusion; give --fusion NAME.")
    config = LlavaAudioConfig.from_dict(base.to_dict() | changes)
    if config.fusion == CONCATENATE:
        raise ValueError(
            f"fusion: {arguments.base_model} has none ({CONCATENATE}); give one, such as --fusion ot_attention, or "
            "shared_projector for tokens that are only concatenated."
        )
    untrained = {"audio_projector", "fusion"} - set(arguments.train_parts)
    if config.fusion != base.fusion and untrained:
        raise ValueError(
            f"train_parts: the fusion {config.fusion} is new in {arguments.base_model}, so its parts must be trained; "
            f"add {', '.join(sorted(untrained))}."
        )
    return config


def build_objective(arguments: LavcapArguments) -> TokenAssignmentLoss | None:
    """
    Build the loss between the tokens; None without a weight.

    Raises:
        ValueError: an option is unknown or has an invalid value, or no modality has tokens of both kinds.
    """
    known = list(inspect.signature(TokenAssignmentLoss).parameters)
    if unknown := sorted(set(arguments.ot_options) - set(known)):
        raise ValueError(f"ot_options: unknown option {', '.join(unknown)}; known: {', '.join(known)}.")
    try:
        objective = TokenAssignmentLoss(**arguments.ot_options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ot_options: {error}") from error
    if not arguments.ot_weight:
        return None
    if "audiovisual" not in arguments.modalities:
        raise ValueError(
            "ot_weight: audio alone has no image tokens; add the modality audiovisual, or give --ot_weight 0."
        )
    return objective


def stage_model(arguments: LavcapArguments, config: LlavaAudioConfig) -> StageModel:
    """
    What the stage loads and trains; see `StageModel`.

    Args:
        arguments: arguments of the stage.
        config: configuration of the stage, from `fused_config`.

    Raises:
        ValueError: a modality is not supported, or as in `check_parts`, `adapter_config` and `build_objective`.
    """
    if unknown := sorted(set(arguments.modalities) - {"audio", "audiovisual"}):
        raise ValueError(f"modalities: {', '.join(unknown)} is not supported; choose audio, audiovisual or both.")
    check_parts(arguments, config)
    adapter = adapter_config(arguments, config)
    build_objective(arguments)

    def finish(captioner: nn.Module) -> LavcapModel:
        add_adapter(captioner, adapter, arguments.seed)
        return LavcapModel(
            captioner, build_objective(arguments), arguments.ot_weight, arguments.label_smoothing_factor
        )

    heard_only = arguments.modalities == ["audio"]
    return StageModel(
        LlavaAudioOnlyForConditionalGeneration if heard_only else LlavaAudioForConditionalGeneration,
        trained=tuple(trained_modules(arguments.train_parts)),
        samples=tuple(MODALITIES[name] for name in arguments.modalities),
        finish=finish,
    )


def set_prompt(processor: LlavaAudioProcessor, arguments: LavcapArguments, config: LlavaAudioConfig) -> None:
    """
    Give the processor the prompt of the arguments, with which it is saved.

    Raises:
        ValueError: the tokenizer reads a tag as a placeholder, or as in `lavcap_prompt`.
    """
    prompt = lavcap_prompt(arguments.prompt, config.fusion, arguments.audio_tag)
    processor.chat_template, processor.sound_prompt = prompt.chat_template, prompt.request
    text = processor.format_prompt(prompt.request, image=True, audio=True)
    ids = processor.tokenizer(text)["input_ids"]
    if ids.count(config.audio_token_id) > 1 or ids.count(config.image_token_id) > 1:
        raise ValueError(
            f"audio_tag: the tokenizer of {arguments.base_model} reads a tag in {text!r} as a placeholder; choose "
            "another name, such as --audio_tag Speech."
        )


def main(argv: list[str] | None = None) -> LavcapTrainer:
    arguments = parse(argv)
    check_resume(arguments, "lavcap")
    set_seed(arguments.seed)
    config = fused_config(arguments, check_base(arguments))
    lavcap_prompt(arguments.prompt, config.fusion)
    stage = stage_model(arguments, config)
    check_memory(arguments, stage, config)
    rows = captioned_rows(arguments, arguments.split)
    held_out = captioned_rows(arguments, arguments.eval_split) if arguments.eval_split else None
    captioner, processor = load_base(arguments, stage.model_class, stage.trained, config)
    set_prompt(processor, arguments, config)
    captioner.generation_config.update(num_beams=arguments.num_beams, max_new_tokens=arguments.max_new_tokens)
    extractor = processor.feature_extractor
    return LavcapTrainer(
        model=stage.select(captioner),
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=SupervisedCollator(
            processor,
            processor.sound_prompt,
            arguments.modalities,
            wordings=TRAINING_REQUESTS if arguments.varied_requests else (),
            longest_answer=arguments.longest_caption,
            augmentation=Augmentation(
                noise=0.0,
                roll=0,
                mask_mels=arguments.mask_mels,
                mask_frames=arguments.mask_frames,
                mask_value=-extractor.mean / extractor.std,
            ),
            frame=arguments.frame,
            opener=ClipOpener(rows),
            draws=Draws(arguments.seed),
        ),
        processing_class=processor,
        stage="lavcap",
    ).train_and_save()


if __name__ == "__main__":
    run_stage(main)
