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
from .fusion import build_fusion
from .fusion_inputs import FusionInputs, group_by_sample
from .idle_modules import must_run
from .pretrained_llava_audio import LearnedPrefix, LlavaAudioPreTrainedModel, TowerTokens, build_visual_projection


@dataclass
class LlavaAudioModelOutputWithPast(LlavaModelOutputWithPast):
    r"""
    image_hidden_states: projected image tokens, (all image tokens of the batch, text width), or None.
    audio_hidden_states: projected audio tokens, (all audio tokens of the batch, text width), or None.
    fusion_inputs: with a fusion, the encoders' tokens of the samples with audio and images, such as for a loss between
        them: `loss(*outputs.fusion_inputs.to_tuple())`. None without such samples.
    """

    audio_hidden_states: torch.Tensor | None = None
    fusion_inputs: FusionInputs | None = None


@dataclass
class LlavaAudioCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    r"""
    loss: mean negative log-likelihood of `labels`, if given.
    logits: (B, L or `logits_to_keep`, vocabulary).
    image_hidden_states, audio_hidden_states, fusion_inputs: see `LlavaAudioModelOutputWithPast`.
    """

    audio_hidden_states: torch.Tensor | None = None
    fusion_inputs: FusionInputs | None = None


def cast_tokens(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Forward pre-hook that converts tokens to the dtype of a module: float32 if it trains on a 16-bit tower."""
    wide = (weight.dtype for weight in module.parameters() if weight.dtype.itemsize > 1)  # not packed
    dtype = next((dtype for dtype in wide if dtype.is_floating_point), args[0].dtype)
    return tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)


class LlavaAudioModel(TowerTokens, LlavaAudioPreTrainedModel, LlavaModel):
    """
    Vision tower, audio tower, their projectors, learned prefix and language model, without a head.

    The processor writes one placeholder per token, so `last_hidden_state` aligns with `input_ids`.

    ```
    pixel_values   -> vision_tower -> multi_modal_projector -+
    input_features -> audio_tower  -> audio_projector       -+-> placeholders of inputs_embeds -> language_model
                                      prefix                -+
    ```

    With a fusion, both modalities of a sample take another way. Images alone keep theirs:

    ```
    image tokens, audio tokens -> fusion -> audio_projector -> placeholders of inputs_embeds
    ```
    """

    def __init__(self, config: LlavaAudioConfig):
        super().__init__(config)
        self.audio_tower = build_audio_tower(config.audio_config)
        self.fusion = build_fusion(config.fusion, config.image_width, config.fusion_options)
        if self.fusion is None:
            self.audio_projector = LlavaMultiModalProjector(config)
        else:
            self.audio_projector = nn.Linear(config.image_width, config.text_config.hidden_size)
        if config.vision_pooling == "frame":  # no image captioner has such tokens, so audio_projector projects them
            self.visual_projection = build_visual_projection(config)
            self.multi_modal_projector = None
        self.prefix = LearnedPrefix(config)
        for module in (self.multi_modal_projector, self.fusion, self.audio_projector):
            if module is not None:
                module.register_forward_pre_hook(cast_tokens)
        self.post_init()

    def copy_image_projector(self) -> None:
        """
        Start the audio projector as a copy of the image projector, as DALI does before stage 2.

        Raises:
            ValueError: the model has a fusion, whose projector is a linear layer.
        """
        if self.fusion is not None:
            raise ValueError(
                f"the audio projector of the fusion {self.config.fusion!r} is a linear layer, and the image projector "
                "is not; train the audio projector from its random start."
            )
        self.audio_projector.load_state_dict(self.multi_modal_projector.state_dict())

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        See `LlavaModel.get_image_features`.

        With a fusion, `pooler_output` holds the tokens of each image before the projector, (tokens, vision width).
        """
        if self.fusion is None:
            return super().get_image_features(pixel_values, **kwargs)
        tokens = self.encode_image(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=list(tokens))

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
            of each clip, (tokens of the clip, text width). With a fusion, `pooler_output` holds the tokens before the
            projector.

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
        tokens = outputs.last_hidden_state
        clips = list(tokens if self.fusion is not None else self.audio_projector(tokens))
        if input_features_mask is not None:
            keep = self.audio_tower.token_mask(input_features_mask)
            clips = [clip[mask] for clip, mask in zip(clips, keep, strict=True)]
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=clips,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _scatter(self, inputs_embeds, mask: torch.Tensor, features: torch.Tensor, name: str) -> torch.Tensor:
        """Replace the embeddings where `mask` (B, L) is True by `features` (tokens, text width), in order."""
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
        names = ("vision_tower", "visual_projection", "multi_modal_projector")
        parts = [part for name in names if (part := getattr(self, name, None)) is not None]
        if not hasattr(self, "vision_tower") or not must_run(parts, self.training):
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
            ValueError: neither or both of `input_ids` and `inputs_embeds` are given, the number of placeholders
                differs from the number of tokens, or, with a fusion, a sample has images and several clips.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        image_features = audio_features = fusion_inputs = None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            image = (mm_encoder_outputs or {}).get("image")
            if image is None and pixel_values is not None:
                image = self.get_image_features(pixel_values, return_dict=True)
            elif image is None and past_key_values is None:
                inputs_embeds = self._run_without_image(inputs_embeds)
            audio = None
            if input_features is not None:
                audio = self.get_audio_features(input_features, input_features_mask, return_dict=True)
            elif past_key_values is None:
                inputs_embeds = self._run_without_audio(inputs_embeds)
            images, clips = ([] if media is None else list(media.pooler_output) for media in (image, audio))
            image_mask, audio_mask = input_ids == self.config.image_token_id, input_ids == self.config.audio_token_id
            if self.fusion is None:
                image_features, audio_features = (torch.cat(media) if media else None for media in (images, clips))
                if images:
                    inputs_embeds = self._scatter(inputs_embeds, image_mask, image_features, "image")
                if clips:
                    inputs_embeds = self._scatter(inputs_embeds, audio_mask, audio_features, "audio")
            elif images or clips or past_key_values is None:
                images, clips = ([tokens.to(inputs_embeds.device) for tokens in media] for media in (images, clips))
                inserted = self._insert_fused(inputs_embeds, image_mask, audio_mask, images, clips)
                inputs_embeds, image_features, audio_features, fusion_inputs = inserted
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
            fusion_inputs=fusion_inputs,
        )

    def _insert_fused(self, inputs_embeds, image_mask, audio_mask, images: list, clips: list) -> tuple:
        """Returns the embeddings, the image features and audio features among them, and `fusion_inputs`."""
        inputs_embeds, fusion_inputs = self._fuse(inputs_embeds, image_mask, audio_mask, images, clips)
        image_features = inputs_embeds[image_mask] if images else None
        audio_features = inputs_embeds[audio_mask] if clips else None
        return inputs_embeds, image_features, audio_features, fusion_inputs

    def _fuse(
        self, inputs_embeds, image_mask: torch.Tensor, audio_mask: torch.Tensor, images: list, clips: list
    ) -> tuple[torch.Tensor, FusionInputs | None]:
        """Fuse, project and insert the tokens of `images` and `clips`. Returns the embeddings and `fusion_inputs`."""
        image_projector, width = self.multi_modal_projector, self.config.image_width
        alone, samples, fused = group_by_sample(images, clips, image_mask, audio_mask, image_projector is not None)
        if alone:
            features = image_projector(torch.cat(alone))
            inputs_embeds = self._scatter(inputs_embeds, image_mask & ~fused[:, None], features, "image")
        elif image_projector is not None and must_run((image_projector,), self.training):
            inputs_embeds = inputs_embeds + 0 * image_projector(inputs_embeds.new_zeros(1, width)).mean()
        if must_run((self.fusion, self.audio_projector), self.training):
            if samples is None:
                silent = [inputs_embeds.new_zeros(1, width)]
                samples = FusionInputs.from_samples(silent, silent)
            if not samples.audio_tokens.requires_grad:
                # All ranks or none: FSDP2 reduces the gradients of a module after those of its inputs, if any.
                samples.audio_tokens.requires_grad_()
        if samples is None:
            return inputs_embeds, None
        audio, image = self.fusion(*samples.to_tuple())
        audio, image = audio[samples.audio_mask], image[samples.image_mask]
        features = self.audio_projector(torch.cat([audio, image]))
        if not fused.any():  # of zeros
            return inputs_embeds + 0 * features.mean().to(inputs_embeds), None
        audio, image = features.split([len(audio), len(image)])
        inputs_embeds = self._scatter(inputs_embeds, audio_mask, audio, "audio")
        return self._scatter(inputs_embeds, image_mask & fused[:, None], image, "image"), samples.with_both()

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
            fusion_inputs=outputs.fusion_inputs,
        )


LlavaAudioModel.register_for_auto_class("AutoModel")
LlavaAudioForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "LlavaAudioForConditionalGeneration",
    "LlavaAudioModel",
]
