"""Assembling the processor of a captioner from the tokenizer and the image processor of a released model."""

import json
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoImageProcessor, AutoTokenizer, LlavaConfig, LlavaProcessor
from transformers.utils import PROCESSOR_NAME, is_gguf_available

from dali_llava.processing import LlavaAudioFeatureExtractor, LlavaAudioProcessor  # registered with the Auto classes
from dali_llava.processing.sentencepiece_tokenizer import load_sentencepiece, require_sentencepiece


PLACEHOLDERS = ("<image>", "<audio>", "<prefix>")
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"
WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")


def add_placeholders(tokenizer) -> dict[str, int]:
    """
    Add the placeholder tokens that a tokenizer lacks, as special tokens.

    Args:
        tokenizer: the tokenizer of a language model. It is modified.

    Returns:
        the id of each token in `PLACEHOLDERS`.
    """
    known = tokenizer.get_vocab()
    # Without normalisation, a token is also found directly after text.
    new = [AddedToken(token, special=True, normalized=False) for token in PLACEHOLDERS if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS}


def add_llava_tokens(tokenizer) -> dict[str, int]:
    """
    Add the tokens that LLaVA-1.5 has in transformers, `<image>` and `<pad>`, and the other placeholders.

    The tokenizer of an original LLaVA, with 32000 tokens, gets the same ids as one of transformers' LLaVA, so stages
    fit both. See `add_placeholders` for the arguments.
    """
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return add_placeholders(tokenizer)


def assemble_processor(
    tokenizer, image_processor, feature_extractor, config, chat_template: str | None = None
) -> LlavaAudioProcessor:
    """
    Assemble the processor that fits a configuration.

    Args:
        tokenizer: the tokenizer, with placeholders; see `add_placeholders`.
        image_processor: the image processor of the vision tower.
        feature_extractor: the feature extractor of the audio tower, or None for the one that its configuration
            describes (`audio_config.feature_extractor_kwargs`).
        config: a `LlavaAudioConfig`.
        chat_template: Jinja template; see `LlavaAudioProcessor` for the default.

    Raises:
        ValueError: the placeholders or the number of audio tokens differ from the configuration.
    """
    if feature_extractor is None:
        feature_extractor = LlavaAudioFeatureExtractor(**config.audio_config.feature_extractor_kwargs)
    processor = LlavaAudioProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        feature_extractor=feature_extractor,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type not in WITHOUT_CLASS_TOKEN),
        prefix_length=config.prefix_length,
        chat_template=chat_template,
        prefix_modalities=config.prefix_modalities,
    )
    for name in ("image", "audio", "prefix"):
        written, expected = getattr(processor, f"{name}_token_id"), getattr(config, f"{name}_token_id")
        if written != expected:
            raise ValueError(
                f"{name}_token_index is {expected} in the configuration, but <{name}> is {written} in the tokenizer; "
                "use the ids that add_placeholders returns"
            )
    config.check_processor(processor)
    return processor


def load_tokenizer(folder: Path):
    """
    Load the tokenizer of a LLaVA or of a captioner of this package, with the placeholders.

    Raises:
        FileNotFoundError: it is missing.
        ImportError: the folder has only a SentencePiece model, and the package sentencepiece is missing.
        ValueError: it cannot be read.
    """
    if _is_own(folder):
        return LlavaAudioProcessor.from_pretrained(folder).tokenizer
    if (folder / TOKENIZER_FILE).is_file():
        # With the configuration of LLaVA, transformers reads the file as it is and ignores the class that
        # tokenizer_config.json names. The configuration in the folder may be of the original program.
        tokenizer = _load(AutoTokenizer, "tokenizer", folder, config=LlavaConfig())
    elif (folder / SENTENCEPIECE_FILE).is_file():
        tokenizer = load_sentencepiece(folder / SENTENCEPIECE_FILE)
    else:
        raise FileNotFoundError(
            f"{folder}: no {TOKENIZER_FILE} and no {SENTENCEPIECE_FILE} in it; copy or download the whole folder again"
        )
    tokenizer.chat_template = None  # that of LLaVA's processor, which has no audio and no prefix
    add_llava_tokens(tokenizer)
    return tokenizer


def load_image_processor(folder: Path):
    """
    Load the image processor of a LLaVA, of its vision tower, or of a captioner of this package.

    Raises:
        ValueError: it is missing or cannot be read.
    """
    if _is_own(folder):
        return LlavaAudioProcessor.from_pretrained(folder).image_processor
    return _load(AutoImageProcessor, "image processor", folder)


def load_audio_settings(folder: Path) -> tuple:
    """The feature extractor and the chat template of a captioner of this package; (None, None) for a LLaVA."""
    if not _is_own(folder):
        return None, None
    processor = LlavaAudioProcessor.from_pretrained(folder)
    return processor.feature_extractor, processor.chat_template


def _is_own(folder: Path) -> bool:
    path = folder / PROCESSOR_NAME
    return path.is_file() and json.loads(path.read_text()).get("processor_class") == LlavaAudioProcessor.__name__


def load_language_model_tokenizer(source: Path):
    """
    Load the tokenizer of a language model, with the placeholders. It keeps its chat template.

    Args:
        source: folder or `.gguf` file of the language model.

    Raises:
        ImportError: the package that reads the source, gguf or sentencepiece, is missing.
        ValueError: the tokenizer is missing or cannot be read.
    """
    if source.is_dir():
        if not (source / TOKENIZER_FILE).is_file() and (source / SENTENCEPIECE_FILE).is_file():
            require_sentencepiece(source / SENTENCEPIECE_FILE)
        tokenizer = _load(AutoTokenizer, "tokenizer", source)
    elif is_gguf_available():
        tokenizer = _load(AutoTokenizer, "tokenizer", source.parent, gguf_file=source.name)
    else:
        raise ImportError(f'{source}: reading it needs the package gguf; run pip install "dali-llava[gguf]"')
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, and labels are known by their position
    add_placeholders(tokenizer)
    return tokenizer


def end_token_ids(processor: LlavaAudioProcessor, known: int | list[int] | None) -> int | list[int]:
    """
    The tokens that end an answer: the known ones, and the one that the chat template writes.

    Args:
        processor: processor of the captioner.
        known: `eos_token_id` of the generation config.
    """
    answer_ids = processor.tokenizer(processor.format_prompt("?", answer="!"))["input_ids"]
    known = [known] if isinstance(known, int) else list(known or ())
    ids = list(dict.fromkeys([*known, answer_ids[-1]]))
    return ids[0] if len(ids) == 1 else ids


def _load(auto_class, name: str, folder: Path, **options):
    try:
        return auto_class.from_pretrained(folder, **options)
    except Exception as error:  # tokenizers and transformers raise many types of errors
        message = " ".join(str(error).split())
        raise ValueError(f"{folder}: the {name} cannot be loaded ({message}); copy its files there") from error


def save_llava_processor(source: Path, folder: Path) -> None:
    """
    Save the processor of the image captioner in a captioner, without the placeholders for audio.

    Args:
        source: folder of the captioner.
        folder: folder to write to.
    """
    processor = LlavaAudioProcessor.from_pretrained(source)
    exported = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        image_token=processor.image_token,
        chat_template=processor.chat_template,
    )
    exported.save_pretrained(folder)
    for path in (folder / PROCESSOR_NAME, folder / TOKENIZER_CONFIG_FILE):
        content = json.loads(path.read_text(encoding="utf-8"))
        for part in (content, *filter(lambda value: isinstance(value, dict), content.values())):
            part.pop("auto_map", None)  # the code of the captioner
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / TOKENIZER_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    unused = (processor.audio_token, processor.prefix_token)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in unused]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
