"""LLaVA in all formats becomes a captioner with equal logits, and comes back byte for byte."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from dali_llava.cli import main
from dali_llava.eval.captioner import load_captioner
from dali_llava.modeling import LlavaAudioForConditionalGeneration


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Two prompts, the first with a picture of nine tokens."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 30, (2, 16), generator=generator)
    input_ids[0, 4:13] = 32
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(1, 3, 24, 24, generator=generator),
    }


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("names", ["old", "middle", "new"])
def test_logits_equal_those_of_the_llava_before_and_after(names, native, write_llava, convert, batch, tmp_path):
    out = convert("llava", write_llava(names))
    model, processor = load_captioner(str(out))
    expected = logits(native, batch)
    assert expected.std() > 0.01 and torch.equal(logits(model, batch), expected)
    assert model.config.text_config.vocab_size == 64
    assert [processor.tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "audio", "prefix")] == [
        model.config.image_token_id,
        model.config.audio_token_id,
        model.config.prefix_token_id,
    ]
    assert (model.config.image_token_id, model.config.audio_token_id, model.config.prefix_token_id) == (32, 34, 35)
    assert main(["export-llava", str(out), str(tmp_path / "back")]) == 0
    assert torch.equal(logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "back"), batch), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_export_equals_what_came_in_byte_for_byte(dtype, write_llava, convert, tmp_path):
    source = write_llava("old", dtype)
    out = convert("llava", source)
    assert main(["export-llava", str(out), str(tmp_path / "back")]) == 0
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == dtype and after[name].shape == tensor.shape
        assert after[name].view(torch.uint8).numpy().tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    processor = AutoProcessor.from_pretrained(tmp_path / "back")
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.tokenizer.get_vocab() == AutoProcessor.from_pretrained(source).tokenizer.get_vocab()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert type(model) is LlavaForConditionalGeneration and model.dtype == dtype


def test_the_parts_without_a_source_start_as_in_the_papers(write_llava, convert):
    weights = load_file(convert("llava", write_llava("old", torch.float16)) / "model.safetensors")
    for name, tensor in weights.items():
        if name.startswith("model.audio_projector."):
            assert torch.equal(tensor, weights[name.replace("audio_projector", "multi_modal_projector")]), name
        of_audio = name.startswith(("model.audio_tower.", "model.prefix."))
        assert tensor.dtype == (torch.float32 if of_audio else torch.float16), name
    assert weights["model.prefix.weight"].shape == (16, 32)
    torch.testing.assert_close(weights["model.prefix.weight"].std(), torch.tensor(0.01), rtol=0.2, atol=0)
    positions = weights["model.audio_tower.embeddings.position_embeddings"]
    assert positions.abs().max() <= 1 and positions.std() > 0.5  # sines and cosines


def test_conversion_is_deterministic(write_llava, convert, tmp_path):
    source = write_llava()
    files = [convert("llava", source, out=tmp_path / name) / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("shards", [1, 3])
def test_an_original_llava_with_its_clip(shards, native, write_original, convert, batch, tmp_path, capsys):
    llava, clip = write_original(shards)
    out = convert("llava", llava, ["--vision", clip])
    shown = capsys.readouterr().out
    model, processor = load_captioner(str(out))
    # 32 rows for 36 tokens grow to 64. Text without the new tokens has the same logits for the old ones.
    assert len(processor.tokenizer) == 36 and model.config.text_config.vocab_size == 64
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>", "<audio>", "<prefix>"]) == [32, 33, 34, 35]
    expected = logits(native, batch)
    assert torch.equal(logits(model, batch)[..., :32], expected[..., :32])
    weights = load_file(out / "model.safetensors")
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        torch.testing.assert_close(weights[name][32:], weights[name][:32].mean(0).expand(32, -1))
    assert "2 dropped: constant, computed by the model" in shown and "dropped: text encoder of CLIP" in shown
    assert [(entry["name"], entry["license"], entry["license_from"]) for entry in model.config.sources] == [
        ("original", "llama2", "known for llava; not stated beside the weights"),
        ("clip", "mit", "LICENSE"),
    ]
    assert model.generation_config.pad_token_id == 33 and model.generation_config.temperature is None
    assert main(["export-llava", str(out), str(tmp_path / "back")]) == 0
    exported = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert torch.equal(logits(exported, batch), logits(model, batch))


def test_a_captioner_can_be_the_base(write_llava, convert, batch, tmp_path):
    first = convert("llava", write_llava("old", torch.bfloat16))
    second = convert("llava", first, ["--dtype", "float32"], out=tmp_path / "second")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.float(), after[name]) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    model, processor = load_captioner(str(second))
    assert model.dtype == torch.float32 and processor.feature_extractor.num_mel_bins == 16
    assert len(model.config.sources) == 1


def test_a_tied_head(native, write_llava, convert, batch, tmp_path):
    source = write_llava()
    weights = load_file(source / "model.safetensors")
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    out = convert("llava", source)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    expected = logits(LlavaForConditionalGeneration.from_pretrained(source), batch)
    assert torch.equal(logits(LlavaAudioForConditionalGeneration.from_pretrained(out), batch), expected)
    assert main(["export-llava", str(out), str(tmp_path / "back")]) == 0
    assert torch.equal(logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "back"), batch), expected)


def test_a_converted_captioner_loads_without_the_package(write_llava, convert, run_without_package, tmp_path):
    out = convert("llava", write_llava())
    script = """
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([type(model).__name__, type(processor).__name__]))
"""
    names = run_without_package(script, tmp_path, out)
    assert names == ["LlavaAudioForConditionalGeneration", "LlavaAudioProcessor"]


def test_the_export_runs_in_a_fresh_process(write_llava, convert, tmp_path):
    """Other tests register the classes of a checkpoint. The command registers them itself."""
    script = "import sys; from dali_llava.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["export-llava", str(convert("llava", write_llava())), str(tmp_path / "back")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    other = [line for line in done.stderr.splitlines() if "import of cpp extensions" not in line]  # of torchao
    assert (done.returncode, other) == (0, [])
