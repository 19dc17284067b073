"""LLaVA-Audio (DALI): an image captioner with an audio tower, an audio projector and a learned prefix."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
)
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .audio_towers import build_audio_tower
from .configuration_llava_audio import LlavaAudioConfig
from .idle_modules import must_run
from .pretrained_llava_audio import LearnedPrefix, LlavaAudioPreTrainedModel, TowerTokens


@dataclass
class LlavaAudioModelOutputWithPast(LlavaModelOutputWithPast):
    r"""
    image_hidden_states: projected image tokens, (all image tokens of the batch, text width), or None.
    audio_hidden_states: projected audio tokens, (all audio tokens of the batch, text width), or None.
    """

    audio_hidden_states: torch.Tensor | None = None


@dataclass
class LlavaAudioCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    r"""
    loss: mean negative log-likelihood of `labels`, if given.
    logits: (B, L or `logits_to_keep`, vocabulary).
    image_hidden_states, audio_hidden_states: see `LlavaAudioModelOutputWithPast`.
    """

    audio_hidden_states: torch.Tensor | None = None


def cast_tokens(projector: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Forward pre-hook that converts tokens to the dtype of a projector: float32 if it trains on a 16-bit tower."""
    wide = (weight.dtype for weight in projector.parameters() if weight.dtype.itemsize > 1)  # not packed
    dtype = next((dtype for dtype in wide if dtype.is_floating_point), args[0].dtype)
    return (args[0].to(dtype),)


class LlavaAudioModel(TowerTokens, LlavaAudioPreTrainedModel, LlavaModel):
    """
    Vision tower, audio tower, their projectors, learned prefix and language model, without a head.

    The processor writes one placeholder per token, so `last_hidden_state` aligns with `input_ids`.

    ```
    pixel_values   -> vision_tower -> multi_modal_projector -+
    input_features -> audio_tower  -> audio_projector       -+-> placeholders of inputs_embeds -> language_model
                                      prefix                -+
    ```
    """

    def __init__(self, config: LlavaAudioConfig):
        super().__init__(config)
        self.audio_tower = build_audio_tower(config.audio_config)
        self.audio_projector = LlavaMultiModalProjector(config)
        self.prefix = LearnedPrefix(config)
        for projector in (self.multi_modal_projector, self.audio_projector):
            projector.register_forward_pre_hook(cast_tokens)
        self.post_init()

    def copy_image_projector(self) -> None:
        """Start the audio projector as a copy of the image projector, as DALI does before stage 2."""
        self.audio_projector.load_state_dict(self.multi_modal_projector.state_dict())

    @can_return_tuple
    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Audio tokens before and after the projector.

        Args:
            input_features: (clips, frames, mels), from the processor.
            input_features_mask: (clips, frames), True for valid frames; all frames are valid by default.

        Returns:
            `last_hidden_state` (clips, tokens, vision width) and `pooler_output`, a list with the projected tokens
            of each clip, (tokens of the clip, text width).

        Raises:
            ValueError: the audio tower returns another number of tokens than its configuration declares.
        """
        input_features = input_features.to(self.audio_tower.dtype)
        outputs = self.audio_tower(input_features, input_features_mask, return_dict=True, **kwargs)
        returned, frames = outputs.last_hidden_state.shape[1], input_features.shape[1]
        if returned != (expected := self.config.audio_config.num_audio_tokens(frames)):
            raise ValueError(
                f"{type(self.audio_tower).__name__} returned {returned} tokens for {frames} frames, but "
                f"{type(self.config.audio_config).__name__}.num_audio_tokens({frames}) is {expected}."
            )
        projected = list(self.audio_projector(outputs.last_hidden_state))
        if input_features_mask is not None:
            keep = self.audio_tower.token_mask(input_features_mask)
            projected = [tokens[mask] for tokens, mask in zip(projected, keep, strict=True)]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=projected,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _scatter(self, inputs_embeds, input_ids, token_id: int, features: torch.Tensor, name: str) -> torch.Tensor:
        """Replace the embeddings of `token_id` in `input_ids` by `features` (tokens, text width), in order."""
        mask = input_ids == token_id
        torch_compilable_check(
            mask.sum() == features.shape[0],
            lambda: (
                f"the text contains {int(mask.sum())} {name} placeholders for {features.shape[0]} {name} tokens; "
                "use the processor to write the placeholders."
            ),
        )
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features.to(inputs_embeds))

    # On several ranks, a tower without input in the batch of this rank runs on zeros, and its tokens times zero are
    # added; see `must_run`.

    def _run_without_image(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        vision_tower = getattr(self, "vision_tower", None)
        if vision_tower is None or not must_run((vision_tower, self.multi_modal_projector), self.training):
            return inputs_embeds
        side = self.config.vision_config.image_size
        image = self.get_image_features(inputs_embeds.new_zeros(1, 3, side, side), return_dict=True)
        return inputs_embeds + 0 * torch.cat(list(image.pooler_output)).mean().to(inputs_embeds)

    def _run_without_audio(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        if not must_run((self.audio_tower, self.audio_projector), self.training):
            return inputs_embeds
        spectrogram = self.config.audio_config.feature_extractor_kwargs
        size = spectrogram.get("max_length", 1024), spectrogram.get("num_mel_bins", 128)
        silence = inputs_embeds.new_zeros(1, *size)
        audio = self.get_audio_features(silence, return_dict=True)
        return inputs_embeds + 0 * torch.cat(audio.pooler_output).mean().to(inputs_embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaAudioModelOutputWithPast:
        r"""
        Args:
            input_ids: (B, L), with placeholders already expanded.
            pixel_values: (images, 3, H, W), in the order of their placeholders in the batch.
            input_features, input_features_mask: (clips, frames, mels) and (clips, frames), in the same order.
            inputs_embeds: (B, L, text width) in place of `input_ids`, with all tokens merged by the caller.
            mm_encoder_outputs: encoder outputs by modality that `generate` computes in advance.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds` are given, or the number of placeholders
                differs from the number of tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        image_features = audio_features = None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            image = (mm_encoder_outputs or {}).get("image")
            if image is None and pixel_values is not None:
                image = self.get_image_features(pixel_values, return_dict=True)
            if image is not None:
                image_features = torch.cat(list(image.pooler_output))
                inputs_embeds = self._scatter(
                    inputs_embeds, input_ids, self.config.image_token_id, image_features, "image"
                )
            elif past_key_values is None:
                inputs_embeds = self._run_without_image(inputs_embeds)
            if input_features is not None:
                audio = self.get_audio_features(input_features, input_features_mask, return_dict=True)
                audio_features = torch.cat(audio.pooler_output)
                inputs_embeds = self._scatter(
                    inputs_embeds, input_ids, self.config.audio_token_id, audio_features, "audio"
                )
            elif past_key_values is None:
                inputs_embeds = self._run_without_audio(inputs_embeds)
            inputs_embeds = self._insert_prefix(inputs_embeds, input_ids)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaAudioModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            audio_hidden_states=audio_features,
        )

    def _insert_prefix(self, inputs_embeds: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace `<prefix>` placeholders by the learned vectors. Each sample has whole prefixes or none."""
        length = self.config.prefix_length
        if input_ids.shape[1] < length and not self.training:  # a decoding step; the prefix is in the cache
            return inputs_embeds
        mask = input_ids == self.config.prefix_token_id
        torch_compilable_check(
            (mask.sum(-1) % length == 0).all(),
            lambda: (
                f"samples contain {sorted(set(mask.sum(-1).tolist()))} prefix placeholders; use multiples of "
                f"prefix_length, {length}."
            ),
        )
        # Calls the forward of the module, which loads an offloaded weight.
        vectors = self.prefix(torch.arange(length, device=input_ids.device)).repeat(mask.numel() // length, 1)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), vectors.to(inputs_embeds))


class LlavaAudioForConditionalGeneration(LlavaAudioPreTrainedModel, GenerationMixin):
    """
    The captioner: `LlavaAudioModel` with a language-model head.

    Without audio and prefix, its logits equal those of `LlavaForConditionalGeneration` with the same weights.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LlavaAudioConfig):
        super().__init__(config)
        self.model = LlavaAudioModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `LlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See `LlavaAudioModel.get_audio_features`."""
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaAudioCausalLMOutputWithPast:
        r"""
        See `LlavaAudioModel.forward` for the other arguments.

        Args:
            labels: (B, L), the target tokens; -100 at ignored positions.
            logits_to_keep: number of last positions to compute logits for; 0 computes all logits.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaAudioCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
        )


LlavaAudioModel.register_for_auto_class("AutoModel")
LlavaAudioForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "LlavaAudioForConditionalGeneration",
    "LlavaAudioModel",
]
