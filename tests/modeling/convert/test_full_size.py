"""A LLaVA-1.5-7B in 16 bits, 14 GB, converts and comes back within 4 GB of anonymous memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.modeling.convert.captioner import captioner_shapes


GIGABYTE = 10**9
LIMIT = 4 * GIGABYTE
VOCABULARY = 32064
SHARDS = 3
# The fields of llava-hf/llava-1.5-7b-hf, which transformers 4.36 wrote.
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": VOCABULARY,
}
# Runs a command and prints the largest anonymous memory of the process in bytes, sampled every 10 ms.
MEASURED = """
import re, sys, threading
from dali_llava.cli import main

peak, done = 0, threading.Event()

def sample():
    global peak
    while not done.wait(0.01):
        status = open("/proc/self/status").read()
        peak = max(peak, 1024 * int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]))

thread = threading.Thread(target=sample)
thread.start()
code = main(sys.argv[1:])
done.set()
thread.join()
print(peak)
sys.exit(code)
"""


def write_sparse(path: Path, shapes: dict[str, tuple], filled: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file of bfloat16 zeros that uses no disk, except for the tensors in `filled`."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
        for name in shapes.keys() & filled.keys():
            file.seek(8 + len(encoded) + header[name]["data_offsets"][0])
            file.write(filled[name].view(torch.uint8).numpy().tobytes())


@pytest.fixture
def llava_7b(tmp_path, base_tokenizer) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of LLaVA-1.5-7B as transformers 4 writes it, and the tensors that are not zero."""
    if shutil.disk_usage(tmp_path).free < 32 * GIGABYTE:
        pytest.skip("needs 32 GB of free disk in the temporary folder")
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the memory of a process from /proc")
    folder = tmp_path / "llava"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    config = LlavaConfig.from_dict(CONFIG)
    with torch.device("meta"):
        weights = LlavaForConditionalGeneration(config).state_dict()
    names = {
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    start = {name: next(old for old in names if name.startswith(old)) for name in weights}
    shapes = {names[start[name]] + name.removeprefix(start[name]): each.shape for name, each in weights.items()}
    generator = torch.Generator().manual_seed(0)
    filled = {
        name: torch.randn(shapes[name], generator=generator).to(torch.bfloat16)
        for name in ("language_model.model.norm.weight", "multi_modal_projector.linear_2.weight")
    }
    shards = [dict(list(shapes.items())[number::SHARDS]) for number in range(SHARDS)]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write_sparse(folder / file, shard, filled)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base_tokenizer.backend_tokenizer, **special)
    tokenizer.add_tokens([f"<word{number}>" for number in range(len(tokenizer), 32000)])
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 336}
    CLIPImageProcessor(size=size, crop_size={"height": 336, "width": 336}).save_pretrained(folder)
    return folder, filled


def peak_of(*words) -> int:
    """Largest anonymous memory of a command in bytes."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def tensors_of(folder: Path) -> dict[str, Path]:
    """Name of each tensor in a folder -> its file."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


@pytest.mark.slow
def test_a_7b_model_is_converted_and_exported_in_little_memory(llava_7b, tmp_path):
    source, filled = llava_7b
    assert peak_of("convert", "llava", source, tmp_path / "captioner") < LIMIT
    config = LlavaAudioConfig.from_pretrained(tmp_path / "captioner")
    assert (config.image_token_id, config.audio_token_id, config.prefix_token_id) == (32000, 32002, 32003)
    assert (config.dtype, config.text_config.vocab_size) == (torch.bfloat16, VOCABULARY)
    assert config.audio_config.grid_size == (8, 64)
    files = tensors_of(tmp_path / "captioner")
    assert files.keys() == captioner_shapes(config).keys()
    assert max(file.stat().st_size for file in files.values()) < 5.01 * GIGABYTE
    assert peak_of("export-llava", tmp_path / "captioner", tmp_path / "back") < LIMIT
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in filled.items():
        with safe_open(after[name], framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensor)
