"""
The two models of the pre-filter, each as one function: a picture's caption, and a text's place in an embedding space.

    caption(images: list of n pictures) -> list of n str
    embed(texts: list of n str) -> (n, D) float32

Any captioner that transformers loads as an image-text-to-text model will do, our own among them, and any language
model for the embeddings; the paper took BLIP-2 and GPT-2. No code of a checkpoint is ever run.
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

CHAT_PROMPT = "Describe the image in one sentence."  # of a captioner that answers questions, where none is given


def load_captioner(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """
    A captioner and its processor, by Hub id or folder.

    Raises:
        ValueError: when there is no such folder, or its processor does not take pictures and give text.
        OSError: when transformers finds no model of that name.
    """
    _check_folder("captioner", name)
    if AutoConfig.from_pretrained(name, trust_remote_code=False).model_type == LlavaAudioConfig.model_type:
        return captioner.load_captioner(name, device=device, dtype=dtype)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ValueError(f"captioner {name}: its processor has no image processor and tokenizer; name another.")
    return model.to(device).eval(), processor


def make_caption(model: nn.Module, processor, prompt: str | None = None, max_new_tokens: int = 32) -> Caption:
    """
    `caption(images)` of a loaded captioner, greedy, asked from the picture alone. All pictures of a call are a batch.

    Args:
        prompt: the question. Without one our own models are asked what can be seen, chat models for one sentence, and
            the others nothing, as BLIP-2 wants it.
        max_new_tokens: the longest caption.

    The function raises ValueError when the processor rejects a picture.
    """
    if isinstance(model, LlavaAudioForConditionalGeneration):
        return _caption_by_runner(model, processor, prompt or SEE_PROMPT, max_new_tokens)
    processor.tokenizer.padding_side = "left"  # a decoder goes on from the last token

    def caption(images: list[Image.Image]) -> list[str]:
        inputs = _caption_inputs(processor, images, prompt).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.inference_mode():
            sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(sequences[:, : asked.shape[1]], asked):
            sequences = sequences[:, asked.shape[1] :]  # some models repeat the question, others do not
        return [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]

    return caption


def _caption_by_runner(model, processor, prompt: str, max_new_tokens: int) -> Caption:
    """Our own model's `caption`, through the runner that everything else is captioned with."""

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
    """What a captioner of transformers takes for `images`: a chat where it has a template, else the prompt, if any."""
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
    """The language model of a captioner, or the model itself where it is one; the encoder of an encoder-decoder."""
    for part in (model, getattr(model, "model", None)):
        if isinstance(getattr(part, "language_model", None), nn.Module):
            model = part.language_model
            break
    return model.get_encoder() if model.config.is_encoder_decoder else model


def load_language_model(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, object]:
    """
    A language model, or that of a captioner, and its tokenizer, by Hub id or folder.

    Raises:
        ValueError: when there is no such folder.
        OSError: when transformers finds no model of that name.
    """
    _check_folder("embedder", name)
    model = AutoModel.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return language_model(model).to(device).eval(), tokenizer


def make_embed(model: nn.Module, tokenizer, layer: int = -1, batch_size: int = 64) -> Embed:
    """
    `embed(texts)`: the mean over a text's tokens of a language model's hidden states, special tokens left out.

    Args:
        layer: index of the hidden states: 0 are the word embeddings, -1 is the last layer.

    A text without a token has the zero vector.

    Raises:
        ValueError: when the model has no such layer.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if depth is not None and not -depth - 1 <= layer <= depth:
        raise ValueError(
            f"layer must lie in [{-depth - 1}, {depth}], not be {layer}: the embedder has {depth} layers."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 has none; what is padded is masked
    tokenizer.padding_side = "right"  # so that positions start at 0 whatever the batch

    def embed(texts: list[str]) -> torch.Tensor:
        parts = [
            _mean_states(model, tokenizer, texts[i : i + batch_size], layer) for i in range(0, len(texts), batch_size)
        ]
        return torch.cat(parts)

    return embed


def _mean_states(model: nn.Module, tokenizer, texts: list[str], layer: int) -> torch.Tensor:
    """(n, D) means of the hidden states of `layer` over the tokens of each of n texts."""
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
    # A masked state may be anything, NaN included, where a text has no token at all.
    states = states.float().masked_fill(~words[..., None], 0.0)
    return (states.sum(1) / words.sum(1, keepdim=True).clamp(min=1)).cpu()


def load_sentence_embed(name: str, device: torch.device) -> Embed:
    """
    `embed(texts)` of a model of sentence-transformers, which is not among our dependencies.

    Raises:
        ValueError: when there is no such folder, or the package is not installed.
    """
    _check_folder("embedder", name)
    try:
        package = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise ValueError("embedder_kind sentence: install sentence-transformers, or take language_model.") from error
    model = package.SentenceTransformer(name, device=str(device), trust_remote_code=False)
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float().cpu()


def _check_folder(field: str, name: str) -> None:
    """ValueError for a path that leads nowhere, which transformers would take for the name of a repository. A path
    of one slash may be such a name, and is left to transformers."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ValueError(f"{field} {name}: no such directory; name a checkpoint's folder or a Hub id.")
