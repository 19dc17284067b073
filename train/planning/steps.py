"""Trace one training step, or the captioning of one batch, with the code of the model and without its memory."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType, SimpleNamespace

import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from transformers import DynamicCache

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration, LlavaAudioModel
from dali_llava.modeling.fusion_inputs import FusionInputs
from dali_llava.train.losses import TransportLoss
from dali_llava.train.planning.meter import Measurement, measured
from dali_llava.train.planning.stage_model import build_on_meta
from dali_llava.train.trainers.towers import TowerObjective


@dataclass(frozen=True)
class Batch:
    """
    Sizes of a batch.

    Args:
        config: configuration of the captioner.
        inputs: the inputs of each sample; see `StageModel`.
        size: number of samples.
        text_tokens: tokens of a sample's question and answer; 0 for the alignment, which reads no text.
        frames: number of images of a sample with images.
    """

    config: LlavaAudioConfig
    inputs: Sequence[str]
    size: int
    text_tokens: int
    frames: int = 1

    @property
    def image_tokens(self) -> int:
        """Tokens of the images of a sample."""
        if self.config.vision_pooling == "frame":
            return self.frames
        vision = self.config.vision_config
        whole = self.config.vision_feature_select_strategy == "full"  # with the class token
        return self.frames * ((vision.image_size // vision.patch_size) ** 2 + whole)

    @property
    def spectrogram(self) -> tuple[int, int]:
        """Frames and mel bins of one window of sound."""
        kwargs = self.config.audio_config.feature_extractor_kwargs
        return kwargs.get("max_length", 1024), kwargs.get("num_mel_bins", 128)

    @property
    def sequence(self) -> int:
        """Tokens of a sample: text, image, audio and prefix."""
        audio = self.config.audio_config
        counts = {
            "image": self.image_tokens,
            "image_tokens": self.image_tokens,
            "audio": audio.num_audio_tokens(self.spectrogram[0]),
            "prefix": self.config.prefix_length,
        }
        return self.text_tokens + sum(counts[name] for name in self.inputs)

    def media(self) -> dict[str, torch.Tensor]:
        """Inputs of the towers."""
        side = self.config.vision_config.image_size
        tokens = (self.image_tokens, self.config.audio_config.output_size)
        shapes = {
            "image": ("pixel_values", (3, side, side)),
            "image_tokens": ("image_tokens", tokens),
            "audio": ("input_features", self.spectrogram),
        }
        chosen = [shapes[name] for name in self.inputs if name in shapes]
        count = {"pixel_values": self.size * self.frames}
        return {name: torch.zeros(count.get(name, self.size), *shape) for name, shape in chosen}

    def text(self) -> dict[str, torch.Tensor]:
        """
        Inputs of the language model, with the placeholders of the media.
        """
        config, spans = self.config, []
        for name, token, count in (
            ("image", config.image_token_id, self.image_tokens),
            ("audio", config.audio_token_id, config.audio_config.num_audio_tokens(self.spectrogram[0])),
            ("prefix", config.prefix_token_id, config.prefix_length),
        ):
            spans += [token] * count if name in self.inputs else []
        spans += [config.text_config.bos_token_id or 0] * self.text_tokens
        input_ids = torch.tensor([spans]).repeat(self.size, 1)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}


def trace_training_step(
    model: nn.Module,
    batch: Batch,
    autocast: torch.dtype | None = None,
    micro_batches: int = 1,
    gradient_share: float = 1.0,
) -> Measurement:
    """
    Trace the forward and the backward pass of a batch.

    Args:
        model: the module to train, on the meta device. It is replaced by one of fake tensors.
        batch: sizes of the batch.
        autocast: dtype of the autocast.
        micro_batches: batches per update. With several, the gradients of the others are in memory.
        gradient_share: part of the gradients that stays in memory.

    Returns:
        the memory beside the weights, and the operations of one batch.
    """
    model.train()
    objective = getattr(model, "objective", None)
    if isinstance(objective, TransportLoss):
        objective.problem = _UnsolvedTransport
    _insert_alike(model)
    count = min(2, micro_batches)
    with measured([model], gradient_share) as measurement:
        for _ in range(count):
            step(model, batch, autocast).backward()
    measurement.flops //= count
    return measurement


def step(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> torch.Tensor:
    """Return the loss of a batch, with the dtypes of `accelerate`."""
    inputs = batch.media()
    if not isinstance(model, TowerObjective):
        inputs |= batch.text()
        inputs["labels"] = inputs["input_ids"]
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with context:
        output = model(**inputs)
    return convert_to_fp32(output).loss if autocast is not None else output.loss


def _insert_alike(model: nn.Module) -> None:
    """
    Let a fusion group tokens by their number. Which tokens belong to a sample depends on `input_ids`, and fake tensors
    have no values; but the samples of a batch are alike.
    """

    def insert(self, inputs_embeds, image_mask, audio_mask, images, clips):
        size = len(inputs_embeds)
        audio = torch.stack(clips)
        image = torch.cat(images).unflatten(0, (size, -1)) if images else audio[:, :0]
        masks = (torch.ones(tokens.shape[:2], dtype=torch.bool) for tokens in (audio, image))
        inputs = FusionInputs(audio, image, *masks)
        fused = [tokens.flatten(0, 1) for tokens in self.fusion(*inputs.to_tuple())]
        audio, image = self.audio_projector(torch.cat(fused)).split([len(tokens) for tokens in fused])
        inputs_embeds = self._scatter(inputs_embeds, audio_mask, audio, "audio")
        inputs_embeds = self._scatter(inputs_embeds, image_mask, image, "image")
        return inputs_embeds, image, audio, inputs if images else None

    for module in model.modules():
        if isinstance(module, LlavaAudioModel):
            module._insert_fused = MethodType(insert, module)


class _UnsolvedTransport:
    """Stands for a transport problem, which is solved with NumPy: its gradients reach all tokens and weights."""

    def __init__(self, audio: torch.Tensor, image: torch.Tensor, a: torch.Tensor, b: torch.Tensor):
        self.x = audio
        self.cost = (a * audio.square().sum(-1)).sum(-1) + (b * image.square().sum(-1)).sum(-1)

    def solve(self) -> None:
        return None

    def result(self, solution: None) -> SimpleNamespace:
        return SimpleNamespace(cost=self.cost, gap=self.cost.detach())


def trace_captioning(
    config: LlavaAudioConfig, batch: Batch, dtype: torch.dtype, new_tokens: int, attention: str | None = None
) -> tuple[Measurement, int]:
    """
    Trace the captioning of a batch: the first forward pass, and the last of `new_tokens` decoding steps.

    Args:
        config: configuration of the captioner.
        batch: sizes of the batch. `text_tokens` are those of the prompt.
        dtype: dtype of the captioner.
        new_tokens: number of tokens per caption.
        attention: attention implementation.

    Returns:
        the memory beside the weights, the cache and the operations of all tokens; and the bytes of the weights.
    """
    model = build_on_meta(LlavaAudioForConditionalGeneration, config, dtype, attention).eval()
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    with measured([model]) as first, torch.no_grad():
        inputs = batch.media() | batch.text() | {"use_cache": True, "logits_to_keep": 1}
        _ = model(**inputs)
    with measured([model]) as last, torch.no_grad():
        cache = _filled_cache(config, batch.size, batch.sequence + new_tokens - 1, dtype)
        token = torch.zeros(batch.size, 1, dtype=torch.long)
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
        last.cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    last.flops = first.flops + new_tokens * last.flops
    last.peak = max(first.peak, last.peak)
    return last, weights


def _filled_cache(config: LlavaAudioConfig, size: int, length: int, dtype: torch.dtype) -> DynamicCache:
    """Cache of keys and values of `length` tokens."""
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = DynamicCache(config=text)
    for layer in range(text.num_hidden_layers):
        keys, values = (torch.zeros(size, text.num_key_value_heads, length, width, dtype=dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache
