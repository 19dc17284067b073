"""
The two models of the pre-filter, each wrapped in a function: an image captioner and a text embedder.

    caption(images: list of n images) -> list of n str
    embed(texts: list of n str) -> (n, D) float32

The captioner is any model that transformers loads for image-text-to-text, including ours. The embedder is any language
model. The paper uses BLIP-2 and GPT-2. Code that a checkpoint brings is never run.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from dali_llava.eval import captioner
from dali_llava.eval.runner import CaptionRunner, Sample
from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.processing import SEE_PROMPT


Caption = Callable[[list[Image.Image]], list[str]]
Embed = Callable[[list[str]], torch.Tensor]

CHAT_PROMPT = "Describe the image in one sentence."  # default prompt of chat models


def load_captioner(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """
    Load a captioner and its processor from a Hub id or a folder.

    Raises:
        ValueError: if the folder does not exist, or its processor has no image processor or no tokenizer.
        OSError: if transformers cannot find the model.
        OSError, ValueError: for our own models, as in `dali_llava.eval.captioner.load_captioner`.
    """
    _check_folder("captioner", name)
    if AutoConfig.from_pretrained(name, trust_remote_code=False).model_type == LlavaAudioConfig.model_type:
        return captioner.load_captioner(name, device=device, dtype=dtype)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ValueError(f"captioner {name}: its processor lacks an image processor or a tokenizer; name another.")
    return model.to(device).eval(), processor


def make_caption(model: nn.Module, processor, prompt: str | None = None, max_new_tokens: int = 32) -> Caption:
    """
    Build `caption(images)` from a captioner. It decodes greedily, from the image only, all images in one batch.

    Args:
        model: captioner as returned by `load_captioner`.
        processor: its processor.
        prompt: question to the model. By default, our models are asked what can be seen and chat models for a
            description in one sentence. Other models, such as BLIP-2, get no prompt.
        max_new_tokens: maximum length of a caption.

    Returns:
        a function from n images to n captions, which raises a ValueError if the processor rejects an image.
    """
    if isinstance(model, LlavaAudioForConditionalGeneration):
        return _caption_by_runner(model, processor, prompt or SEE_PROMPT, max_new_tokens)
    processor.tokenizer.padding_side = "left"  # generation continues from the last token

    def caption(images: list[Image.Image]) -> list[str]:
        inputs = _caption_inputs(processor, images, prompt).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.inference_mode():
            sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(sequences[:, : asked.shape[1]], asked):
            sequences = sequences[:, asked.shape[1] :]  # some models return the prompt, others do not
        return [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]

    return caption


def _caption_by_runner(model, processor, prompt: str, max_new_tokens: int) -> Caption:
    """Build `caption(images)` from our own model, with the runner of the other commands."""

    def caption(images: list[Image.Image]) -> list[str]:
        runner = CaptionRunner(model, processor, batch_size=max(1, len(images)), max_new_tokens=max_new_tokens)
        samples = [Sample(str(index), prompt, image=image, prefix=False) for index, image in enumerate(images)]
        results = list(runner.run(samples, progress=False))
        for result in results:
            if result.error is not None:
                raise ValueError(result.error)
        return [result.caption for result in results]

    return caption


def _caption_inputs(processor, images: list[Image.Image], prompt: str | None):
    """Inputs of a transformers captioner: a chat if the processor has a template, otherwise the prompt, if given."""
    if getattr(processor, "chat_template", None):
        text = {"type": "text", "text": prompt or CHAT_PROMPT}
        chats = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in images]
        return processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    if prompt:
        return processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="pt")
    return processor(images=images, return_tensors="pt")


def language_model(model: nn.Module) -> nn.Module:
    """Return the language model of a captioner, or the model itself; for an encoder-decoder, its encoder."""
    for part in (model, getattr(model, "model", None)):
        if isinstance(getattr(part, "language_model", None), nn.Module):
            model = part.language_model
            break
    return model.get_encoder() if model.config.is_encoder_decoder else model


def load_language_model(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, object]:
    """
    Load a language model, or the language model of a captioner, and its tokenizer from a Hub id or a folder.

    Raises:
        ValueError: if the folder does not exist.
        OSError: if transformers cannot find the model.
    """
    _check_folder("embedder", name)
    model = AutoModel.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return language_model(model).to(device).eval(), tokenizer


def make_embed(model: nn.Module, tokenizer, layer: int = -1, batch_size: int = 64) -> Embed:
    """
    Build `embed(texts)`: the mean of a language model's hidden states over the tokens of a text.

    Special tokens are excluded. A text without tokens has the zero vector.

    Args:
        model: language model as returned by `load_language_model`.
        tokenizer: its tokenizer.
        layer: index of the hidden states; 0 for the word embeddings, -1 for the last layer.
        batch_size: number of texts per forward pass.

    Raises:
        ValueError: if the model has no such layer.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if depth is not None and not -depth - 1 <= layer <= depth:
        raise ValueError(f"layer must be in [{-depth - 1}, {depth}], not {layer}: the embedder has {depth} layers.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 has no padding token; padding is masked
    tokenizer.padding_side = "right"  # so that positions start at 0 in every batch

    def embed(texts: list[str]) -> torch.Tensor:
        parts = [
            _mean_states(model, tokenizer, texts[i : i + batch_size], layer) for i in range(0, len(texts), batch_size)
        ]
        return torch.cat(parts)

    return embed


def _mean_states(model: nn.Module, tokenizer, texts: list[str], layer: int) -> torch.Tensor:
    """Mean hidden states (n, D) of `layer` over the tokens of each of n texts."""
    inputs = tokenizer(texts, padding=True, truncation=True, return_special_tokens_mask=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    words = inputs["attention_mask"].bool() & ~inputs["special_tokens_mask"].bool()  # (n, tokens)
    if words.shape[1] == 0:
        inputs["input_ids"] = words.new_full((len(texts), 1), tokenizer.pad_token_id, dtype=torch.long)
        inputs["attention_mask"], words = torch.ones_like(inputs["input_ids"]), words.new_zeros((len(texts), 1))
    with torch.inference_mode():
        states = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        ).hidden_states[layer]
    # The states of a text without tokens are undefined and may be NaN.
    states = states.float().masked_fill(~words[..., None], 0.0)
    return (states.sum(1) / words.sum(1, keepdim=True).clamp(min=1)).cpu()


def load_sentence_embed(name: str, device: torch.device) -> Embed:
    """
    Build `embed(texts)` from a sentence-transformers model. The package is not a dependency of this project.

    Raises:
        ValueError: if the folder does not exist or sentence-transformers is not installed.
    """
    _check_folder("embedder", name)
    try:
        package = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise ValueError("embedder_kind sentence: install sentence-transformers, or use language_model.") from error
    model = package.SentenceTransformer(name, device=str(device), trust_remote_code=False)
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float().cpu()


def _check_folder(field: str, name: str) -> None:
    """Raise a ValueError for a path that does not exist, which transformers would read as a repository name. A name
    with a single slash may be a repository and is left to transformers."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ValueError(f"{field} {name}: no such directory; give the folder of a checkpoint or a Hub id.")
