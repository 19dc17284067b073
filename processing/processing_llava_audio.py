"""Processor of LLaVA-Audio: converts text, images and audio to model inputs."""

import json
import re
from itertools import chain, islice, repeat

from transformers import processing_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import get_image_size, make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin
from transformers.utils import CONFIG_NAME, cached_file, is_vision_available

from .chat_templates import DALI_CHAT_TEMPLATE, with_media
from .feature_extraction_llava_audio import LlavaAudioFeatureExtractor


if is_vision_available():
    from PIL import Image, ImageOps
    from transformers.image_transforms import to_pil_image

SOUND_PROMPT = "What sound can be heard in this scene ?"
SEE_PROMPT = "What can you see ?"

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

MODEL_FIELDS = ("prefix_modalities", "vision_pooling")  # read from the model's configuration in the same folder

# keyword arguments that apply only to the text if they are passed outside `audio_kwargs`
TEXT_ONLY_KWARGS = ("padding", "max_length", "truncation", "pad_to_multiple_of", "return_attention_mask")


class LlavaAudioProcessor(ProcessorMixin):
    r"""
    Wraps an image processor, a tokenizer and a feature extractor.

    In the text, each `<image>` is repeated once per image token (576 at full size), each `<audio>` once per audio
    token (512), and each `<prefix>` `prefix_length` times (16). Batches are padded on the left; the processor sets
    `tokenizer.padding_side`.

    If `num_frames` is more than 1, a text with one `<image>` takes a picture or the frames of a clip. The frames are
    nested by text, `images=[[frame, frame, ...], [], [picture]]`. The `<image>` is then repeated for all frames, and
    `pixel_values` contains all frames of the batch in order.

    Args:
        image_processor (`BaseImageProcessor`): the image processor of the vision tower.
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with the placeholder tokens.
        feature_extractor (`FeatureExtractionMixin`): [`LlavaAudioFeatureExtractor`], or any feature extractor that
            returns `input_features` (and `input_features_mask` for clips of different lengths) and has
            `num_audio_tokens(num_frames)`.
        patch_size (`int`): patch size of the vision tower.
        vision_feature_select_strategy (`str`): `"default"` drops the vision tower's first token (CLIP's CLS), `"full"`
            keeps all tokens.
        num_additional_image_tokens (`int`): tokens of the vision tower besides its patches: 1 for CLIP, 0 for SigLIP.
        prefix_length (`int`): number of learned prefix vectors of the model.
        prefix_modalities (`list[str]`): modalities (`"audio"`, `"audiovisual"`) that get the prefix by default.
            `from_pretrained` reads it from the model's configuration in the same folder.
        vision_pooling (`str`): `"patches"` for one token per patch, `"frame"` for one per image. `from_pretrained`
            reads it from the model's configuration in the same folder.
        sound_prompt (`str`): question about the sound of a clip, with which the model captions by default.
        num_frames (`int`): maximum number of frames of a clip.
        frame_rate (`float`): maximum number of frames per second that are taken from a video.
        pad_to_square (`bool`): whether to pad images to a square with the mean colour of the image processor,
            (122, 116, 104) for CLIP, as LLaVA-1.5 does. Square images are not changed.
        image_token, audio_token, prefix_token (`str`): the placeholders. The chat template uses the default ones.
        chat_template (`str`, *optional*): Jinja template. By default, that of the tokenizer, with the media at the
            start of their turn; `DALI_CHAT_TEMPLATE`, the format of LLaVA-1.5, if the tokenizer has none.

    Raises:
        ValueError: if the tokenizer lacks a placeholder token, its chat template takes no text, the feature extractor
            lacks `num_audio_tokens`, or an option is out of its range.
    """

    text_kwargs = {"padding": True, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}
    audio_kwargs = {"padding": "max_length", "return_tensors": "pt"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        feature_extractor=None,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 1,
        prefix_length: int = 16,
        pad_to_square: bool = True,
        image_token: str = "<image>",
        audio_token: str = "<audio>",
        prefix_token: str = "<prefix>",
        chat_template: str | None = None,
        prefix_modalities: list[str] | tuple[str, ...] = (),
        vision_pooling: str = "patches",
        sound_prompt: str = SOUND_PROMPT,
        num_frames: int = 1,
        frame_rate: float = 2.0,
    ):
        if vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy={vision_feature_select_strategy!r} is unknown; choose default or full"
            )
        if vision_pooling not in ("patches", "frame"):
            raise ValueError(f"vision_pooling={vision_pooling!r} is unknown; choose patches or frame")
        if num_frames < 1 or not frame_rate > 0:
            raise ValueError(
                f"num_frames={num_frames}, frame_rate={frame_rate}; give at least 1 frame and a rate above 0"
            )
        if not hasattr(feature_extractor, "num_audio_tokens"):
            raise ValueError(
                f"{type(feature_extractor).__name__} has no num_audio_tokens(num_frames); use "
                f"{LlavaAudioFeatureExtractor.__name__} or another feature extractor with this method"
            )
        if chat_template is None:
            chat_template = self._default_chat_template(tokenizer)
        super().__init__(image_processor, tokenizer, feature_extractor, chat_template=chat_template)
        tokenizer.padding_side = "left"  # generation continues the text, so padding must not follow it
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.prefix_length = prefix_length
        self.sound_prompt = sound_prompt
        self.prefix_modalities = list(prefix_modalities)
        self.pad_to_square = pad_to_square
        self.vision_pooling = vision_pooling
        self.num_frames = num_frames
        self.frame_rate = frame_rate
        self.image_token, self.image_token_id = image_token, self._token_id(image_token)
        self.audio_token, self.audio_token_id = audio_token, self._token_id(audio_token)
        self.prefix_token, self.prefix_token_id = prefix_token, self._token_id(prefix_token)

    @staticmethod
    def _default_chat_template(tokenizer) -> str:
        if not getattr(tokenizer, "chat_template", None):
            return DALI_CHAT_TEMPLATE
        return with_media(tokenizer.get_chat_template(), **tokenizer.special_tokens_map)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, **kwargs):
        # `AutoTokenizer` reads config.json only to choose a class, which tokenizer_config.json specifies. Without a
        # default here, a process that has not imported the model code would ask to trust its copy in the checkpoint.
        kwargs.setdefault("config", PreTrainedConfig())
        return super()._load_tokenizer_from_pretrained(sub_processor_type, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """See `ProcessorMixin.get_processor_dict`. Adds `MODEL_FIELDS` of the model in the same folder."""
        hub_kwargs = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        processor_dict, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        path = cached_file(
            pretrained_model_name_or_path,
            CONFIG_NAME,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_kwargs,
        )
        if path is not None:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            processor_dict |= {name: config[name] for name in MODEL_FIELDS if name in config}
        return processor_dict, kwargs

    def _token_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no {token} token: add it with"
                f' tokenizer.add_special_tokens({{"additional_special_tokens": ["{token}"]}})'
            )
        return token_id

    @property
    def frame_options(self) -> dict:
        """Arguments of the functions that open frames of clips. Several frames are shrunk, which saves memory."""
        size = self.image_processor.size
        side = None if self.num_frames == 1 else size.get("shortest_edge") or min(size["height"], size["width"])
        return {"num_frames": self.num_frames, "frame_rate": self.frame_rate, "shorter_side": side}

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]  # many fast tokenizers return them, but the model does not use them

    def _merge_kwargs(self, ModelProcessorKwargs=None, tokenizer_init_kwargs=None, **kwargs) -> dict[str, dict]:
        merged = super()._merge_kwargs(ModelProcessorKwargs, tokenizer_init_kwargs=tokenizer_init_kwargs, **kwargs)
        # `processor(..., padding=True)`, or a tokenizer saved with it, refers to the text. Only `audio_kwargs` applies
        # to clips; otherwise this common call would silently change the number of audio tokens
        asked = {**self.audio_kwargs, **kwargs.get("audio_kwargs", {})}
        for key in (*TEXT_ONLY_KWARGS, "load_audio_backend"):
            merged["audio_kwargs"].pop(key, None)
            if key in asked and key != "load_audio_backend":
                merged["audio_kwargs"][key] = asked[key]
        # a tokenizer saved with right padding would place the answer after the padding
        side = kwargs.get("padding_side", kwargs.get("text_kwargs", {}).get("padding_side", "left"))
        merged["text_kwargs"]["padding_side"] = side
        return merged

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if isinstance(images, (list, tuple)):
            images = self._group_clips(images, text)
            self._check_nested("images", self.image_token, images, text)
            images = [image for group in images for image in (group if isinstance(group, (list, tuple)) else [group])]
            images = images or None
        if isinstance(audio, (list, tuple)):
            if not any(isinstance(clip, (list, tuple)) and clip and isinstance(clip[0], float) for clip in audio):
                self._check_nested("clips", self.audio_token, audio, text)
            audio = audio or None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _group_clips(self, images: list, text: str | list[str] | None) -> list:
        """Make the frames of each text with one placeholder a single item of its list, if there are several."""
        if self.num_frames == 1 or text is None:
            return images
        if isinstance(text, str):
            text = [text]
            images = images if any(isinstance(item, (list, tuple)) for item in images) else [images]
        if len(text) != len(images) or not all(isinstance(frames, (list, tuple)) for frames in images):
            return images
        groups = []
        for index, (sample, frames) in enumerate(zip(text, images, strict=True)):
            is_clip = sample.count(self.image_token) == 1 and len(frames) > 1
            if is_clip and len(frames) > self.num_frames:
                raise ValueError(
                    f"text {index} has {len(frames)} frames, but the processor takes at most "
                    f"num_frames={self.num_frames} per clip; pass fewer frames"
                )
            groups.append([frames] if is_clip else frames)
        return groups

    @staticmethod
    def _check_nested(name: str, token: str, groups: list, text: str | list[str] | None) -> None:
        """Check that each list of media has as many items as its text has placeholders."""
        if not isinstance(text, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in groups):
            return
        found, given = [sample.count(token) for sample in text], [len(group) for group in groups]
        if groups and found != given:
            raise ValueError(f"the texts contain {found} {token} tokens, but {given} {name} were passed")

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if videos is not None:
            raise ValueError("videos are not supported: pass frames as `images` and the sound as `audio`")
        if isinstance(images, (list, tuple)):  # one image per placeholder
            images = [item[0] if isinstance(item, (list, tuple)) else item for item in images]
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images, **kwargs) -> tuple[BatchFeature, list[str]]:
        if isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images):
            clips = [item if isinstance(item, (list, tuple)) else [item] for item in images]
        else:
            clips = [[image] for image in make_flat_list_of_images(images)]
        images = list(chain.from_iterable(clips))
        if self.pad_to_square:
            images = [self._pad_to_square(image) for image in images]
        inputs, replacements = super()._process_images(images, **kwargs)
        replacements = iter(replacements)
        return inputs, ["".join(islice(replacements, len(clip))) for clip in clips]

    def _pad_to_square(self, image):
        """Centre the image on a square of the mean colour. Returns an RGB image, or a square array unchanged."""
        if not isinstance(image, Image.Image):
            height, width = get_image_size(image)
            if height == width:
                return image
            image = to_pil_image(image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        colour = tuple(int(255 * channel) for channel in self.image_processor.image_mean)
        return ImageOps.expand(image, (left, top, side - width - left, side - height - top), fill=colour)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        if self.vision_pooling == "frame":
            return self.image_token
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        num_tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        if self.vision_feature_select_strategy == "default":
            num_tokens -= 1
        return self.image_token * num_tokens

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        if "input_features_mask" in audio_inputs:
            num_frames = int(audio_inputs["input_features_mask"][audio_idx].sum())
        else:
            num_frames = len(audio_inputs["input_features"][audio_idx])
        return self.audio_token * self.feature_extractor.num_audio_tokens(num_frames)

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: list[str] = (),
        videos_replacements: list[str] = (),
        audio_replacements: list[str] = (),
    ) -> tuple[list[str], list[list[dict]]]:
        """See the base class. Also replaces `<prefix>`, a placeholder without an input."""
        replacements = {
            self.image_token: ("image", iter(images_replacements)),
            self.audio_token: ("audio", iter(audio_replacements)),
            self.prefix_token: ("prefix", repeat(self.prefix_token * self.prefix_length)),
        }
        # a placeholder in user text, which `sanitize_control_tokens` marks, is text
        unmarked = getattr(processing_utils, "_UNMARKED", "")
        placeholder = re.compile(unmarked + "(?:" + "|".join(map(re.escape, replacements)) + ")")
        texts, batch_offsets = [], []
        for sample in text:
            pieces, offsets, end, gained = [], [], 0, 0
            for match in placeholder.finditer(sample):
                kind, values = replacements[match.group()]
                replacement = next(values)
                start = match.start() + gained
                offsets.append(
                    {
                        "type": kind,
                        "span": match.span(),
                        "new_span": (start, start + len(replacement)),
                        "text": match.group(),
                        "replacement": replacement,
                    }
                )
                pieces += [sample[end : match.start()], replacement]
                gained += len(replacement) - len(match.group())
                end = match.end()
            texts.append("".join([*pieces, sample[end:]]))
            batch_offsets.append(offsets)
        return texts, batch_offsets

    def apply_chat_template(self, conversation, *args, prefix: bool | None = None, **kwargs):
        """
        See `ProcessorMixin.apply_chat_template`. Also adds the learned prefix to user turns.

        Args:
            conversation: messages, or a list of conversations. A block `{"type": "prefix"}` adds the prefix to a turn.
            prefix: whether user turns without such a block get the prefix. By default, turns with audio get it if
                their modality (`"audio"` or `"audiovisual"`) is in `prefix_modalities` of the checkpoint.
        """
        if conversation and isinstance(conversation[0], (list, tuple)):
            conversation = [[self._add_prefix(message, prefix) for message in each] for each in conversation]
        elif conversation and isinstance(conversation[0], dict):
            conversation = [self._add_prefix(message, prefix) for message in conversation]
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _add_prefix(self, message: dict, prefix: bool | None) -> dict:
        if message.get("role") != "user" or prefix is False:
            return message
        content = message.get("content") or []
        content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        kinds = {block.get("type") for block in content if isinstance(block, dict)}
        modality = "audiovisual" if kinds & {"image", "image_url"} else "audio"
        wanted = "audio" in kinds and modality in self.prefix_modalities if prefix is None else prefix
        if not wanted or "prefix" in kinds:
            return message
        return {**message, "content": [*content, {"type": "prefix"}]}

    def format_prompt(
        self,
        question: str,
        image: bool = False,
        audio: bool = False,
        prefix: bool | None = None,
        answer: str | None = None,
    ) -> str:
        """
        Format one turn with the chat template, such as `"USER: <audio><prefix>\\nQUESTION ASSISTANT:"`.

        The result starts without the beginning-of-sequence token if the tokenizer adds this token.

        Args:
            question: text of the user turn.
            image, audio: whether to add the placeholder of an image or a clip.
            prefix: see `apply_chat_template`.
            answer: text of the assistant turn; the result ends with it and the end token, `" ANSWER</s>"`, if it is
                given.
        """
        present = {"image": image, "audio": audio}
        content = [{"type": kind} for kind, is_present in present.items() if is_present]
        conversation = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        if answer is not None:
            conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self.apply_chat_template(conversation, add_generation_prompt=answer is None, prefix=prefix)
        if answer is not None:
            text = self._cut_after_end_token(text)
        start = self.tokenizer.bos_token
        if start and text.startswith(start) and self._adds_bos_token():
            text = text.removeprefix(start)
        return text

    def _cut_after_end_token(self, text: str) -> str:
        """Cut what a template writes between turns, and add the end token if the template writes none."""
        text = text.rstrip()
        special = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return text if text.endswith(special) else text + (self.tokenizer.eos_token or "")

    def _adds_bos_token(self) -> bool:
        return self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]


LlavaAudioProcessor.register_for_auto_class("AutoProcessor")
