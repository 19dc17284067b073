"""Released weights at small width, in the exact formats: LLaVA of transformers, original LLaVA, CLIP."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)


WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 8, **WIDTH}
AUDIO = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_mel_bins": 16,
    "max_length": 64,
}


@pytest.fixture(scope="session")
def base_tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    """The tiny tokenizer without placeholders, as the language model of LLaVA has it: 32 tokens, no `<pad>`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = [word for word in tiny_tokenizer.get_vocab() if not word.startswith("<")]
    tokens = ["<unk>", "<s>", "</s>", *sorted(words)][:32]
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@pytest.fixture(scope="session")
def native(base_tokenizer) -> LlavaForConditionalGeneration:
    """A LLaVA with 64 rows in its vocabulary, of which the tokenizer uses 34. Float32."""
    text = {"model_type": "llama", "vocab_size": 64, "initializer_range": 0.2, "max_position_embeddings": 128, **WIDTH}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(vision_config=VISION, text_config=text, image_token_index=32, image_seq_length=9)
        return LlavaForConditionalGeneration(config).eval()


NAMES = {
    # transformers 4
    "old": {
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    # transformers 4.52 and later
    "middle": {"model.vision_tower.": "model.vision_tower.vision_model."},
    # in memory in transformers 5
    "new": {},
}


def renamed(weights: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    def rename(name: str) -> str:
        old = next((start for start in names if name.startswith(start)), "")
        return names.get(old, "") + name.removeprefix(old)

    return {rename(name): tensor.contiguous() for name, tensor in weights.items()}


@pytest.fixture
def write_llava(native, base_tokenizer, tmp_path):
    """`write_llava(names, dtype)`: a folder of LLaVA as transformers writes it, with names of `NAMES`."""

    def write_llava(names: str = "old", dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Path:
        folder = folder or tmp_path / f"llava-{names}"
        folder.mkdir()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer.backend_tokenizer, **SPECIAL)
        tokenizer.add_tokens("<image>", special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        image_processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
        processor = LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template="USER: {{ messages[0]['content'] }} ASSISTANT:",
        )
        processor.save_pretrained(folder)
        native.config.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        fields["torch_dtype"] = str(dtype).removeprefix("torch.")
        fields.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(fields))
        weights = {name: tensor.to(dtype) for name, tensor in native.state_dict().items()}
        save_file(renamed(weights, NAMES[names]), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "README.md").write_text("---\nlicense: llama2\nlanguage: [en]\n---\n# LLaVA\n")
        return folder

    return write_llava


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture
def write_original(native, base_tokenizer, tmp_path):
    """`write_original(shards)`: folders of an original LLaVA, whose vocabulary has 32 rows, and of its CLIP."""

    def write_original(shards: int = 2) -> tuple[Path, Path]:
        llava, clip = tmp_path / "original", tmp_path / "clip"
        llava.mkdir()
        weights = {name: each for name, each in native.state_dict().items() if "vision_tower" not in name}
        names = {
            "model.language_model.": "model.",
            "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
            "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        }
        weights = renamed(weights, names)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name] = weights[name][:32].clone()
        for layer in range(WIDTH["num_hidden_layers"]):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weight_map = {}
        for index in range(shards):
            file = f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
            shard = dict(list(weights.items())[index::shards])
            torch.save(shard, llava / file)
            weight_map |= dict.fromkeys(shard, file)
        (llava / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        fields = {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            "vocab_size": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 128,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "mm_hidden_size": 32,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "image_aspect_ratio": "pad",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            **WIDTH,
        }
        (llava / "config.json").write_text(json.dumps(fields))
        generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
        (llava / "generation_config.json").write_text(json.dumps(generation))
        base_tokenizer.save_pretrained(llava)

        text = {"vocab_size": 50, "max_position_embeddings": 16, "projection_dim": 8, **WIDTH}
        config = CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 8}, projection_dim=8)
        model = CLIPModel(config)
        own = {name.removeprefix("model.vision_tower."): each for name, each in native.state_dict().items()}
        model.vision_model.load_state_dict({name: own[name] for name in model.vision_model.state_dict()})
        model.save_pretrained(clip)
        CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(clip)
        (clip / "LICENSE").write_text("MIT License\n\nCopyright\n")
        return llava, clip

    return write_original


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """`convert(*words)`: run `dali-llava convert`, with a small audio tower; returns OUT."""
    from dali_llava.modeling.convert import llava

    original = llava.start_config
    monkeypatch.setattr(llava, "start_config", lambda *args: original(*args[:3], AUDIO | (args[3] or {}), *args[4:]))

    def convert(*words, out: Path | None = None) -> Path:
        from dali_llava.cli import main

        out = out or tmp_path / "captioner"
        *sources, options = words if isinstance(words[-1], list) else (*words, [])
        assert main(["convert", *map(str, sources), str(out), *map(str, options)]) == 0
        return out

    return convert
