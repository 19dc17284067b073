"""Checkpoints: loading without dali_llava, identical bytes after saving, and reports of missing weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dali_llava.modeling import LlavaAudioForConditionalGeneration, LlavaAudioModel
from dali_llava.modeling.modeling_cav_mae import sincos_positions
from dali_llava.processing import SOUND_PROMPT


# The process of a user with the checkpoint and transformers, but without this package.
STRANGER = """
source, stage, sound, target = sys.argv[1:]

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

trust = {"trust_remote_code": True}
report = {"AutoConfig": type(AutoConfig.from_pretrained(source, **trust)).__name__}
processor = AutoProcessor.from_pretrained(source, **trust)
report["AutoProcessor"] = type(processor).__name__
text = processor.format_prompt("What sound can be heard in this scene ?", audio=True, prefix=True)
inputs = processor(text=text, audio=np.load(sound), return_tensors="pt")
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(source, **trust)
    report[auto.__name__] = type(model).__name__
report["tokens"] = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
staged = AutoModelForImageTextToText.from_pretrained(stage, **trust)
report["staged tokens"] = staged.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
report["imported"] = sorted(name for name in sys.modules if name.partition(".")[0] == "dali_llava")
model.save_pretrained(target)
processor.save_pretrained(target)
print(json.dumps(report))
"""


def weights_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_checkpoint_works_and_survives_where_the_package_is_absent(
    tiny_model_dir, tiny_processor, run_without_package, tmp_path
):
    """All Auto classes, the same caption tokens, a stage on top, and the same bytes after two more processes."""
    torch.manual_seed(0)
    time = np.arange(32_000) / 16_000
    sound = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    np.save(tmp_path / "sound.npy", sound)
    model = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir).eval()
    prompt = tiny_processor.format_prompt(SOUND_PROMPT, audio=True, prefix=True)
    inputs = tiny_processor(text=prompt, audio=sound, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    with torch.no_grad():
        model.requires_grad_(False).model.prefix.requires_grad_(True).weight.normal_(std=2.0)
    model.save_stage(tmp_path / "stage", base=str(tiny_model_dir), stage="prefix")
    staged_tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    assert staged_tokens != tokens

    folders = [tiny_model_dir, tmp_path / "second", tmp_path / "third"]
    for number, (source, target) in enumerate(zip(folders, folders[1:], strict=False)):
        home = tmp_path / f"home{number}"
        home.mkdir()
        report = run_without_package(STRANGER, home, source, tmp_path / "stage", tmp_path / "sound.npy", target)
        assert report == {
            "AutoConfig": "LlavaAudioConfig",
            "AutoProcessor": "LlavaAudioProcessor",
            "AutoModel": "LlavaAudioModel",
            "AutoModelForImageTextToText": "LlavaAudioForConditionalGeneration",
            "AutoModelForMultimodalLM": "LlavaAudioForConditionalGeneration",
            "tokens": tokens,
            "staged tokens": staged_tokens,
            "imported": [],
        }
    first, *others = map(weights_of, folders)
    assert first and all(other == first for other in others)


def test_only_safetensors_and_text_are_written(tiny_model_dir):
    endings = {path.suffix for path in tiny_model_dir.rglob("*") if path.is_file()}
    assert endings <= {".safetensors", ".json", ".jinja", ".py", ".txt", ".model"}
    assert len(weights_of(tiny_model_dir)) == 1


def test_folder_without_weights_is_refused_by_name(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors.*" + tmp_path.name):
        LlavaAudioForConditionalGeneration.from_pretrained(tmp_path)


def test_backbone_and_captioner_hold_the_same_weights(tiny_model_dir):
    captioner = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir)
    backbone = LlavaAudioModel.from_pretrained(tiny_model_dir)
    expected = captioner.model.state_dict()
    assert backbone.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state_dict().items())


@pytest.fixture(scope="module")
def bare_dir(tiny_model_dir, tmp_path_factory):
    """The tiny checkpoint without prefix, audio tower and audio projector, like that of an image captioner."""
    folder = tmp_path_factory.mktemp("bare")
    tensors = load_file(tiny_model_dir / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(part in name for part in ("prefix", "audio_tower", "audio_projector"))
    }
    assert 0 < len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    return folder


def test_missing_weights_are_drawn_as_in_a_new_model(bare_dir):
    torch.manual_seed(0)
    captioner, report = LlavaAudioForConditionalGeneration.from_pretrained(bare_dir, output_loading_info=True)
    model, config = captioner.model, captioner.config
    missing = {name for name in captioner.state_dict() if any(p in name for p in ("prefix", "audio_"))}
    assert set(report["missing_keys"]) == missing
    assert all(torch.isfinite(parameter).all() for parameter in captioner.parameters())
    audio = model.audio_tower
    width, (rows, columns) = config.audio_config.hidden_size, config.audio_config.grid_size
    assert torch.equal(audio.embeddings.position_embeddings[0], sincos_positions(width, rows, columns))

    def std(tensor):
        return tensor.detach().std().item()

    assert std(model.prefix.weight) == pytest.approx(config.prefix_initializer_range, rel=0.1)
    assert std(audio.embeddings.modality_embedding) == pytest.approx(config.audio_config.initializer_range, rel=0.4)
    for linear in (audio.proj, audio.layers[0].attention.q_proj, audio.layers[0].mlp.fc1):
        assert std(linear.weight) == pytest.approx(config.audio_config.initializer_range, rel=0.1)
        assert not linear.bias.any()
    assert torch.equal(audio.norm.weight, torch.ones(width)) and not audio.norm.bias.any()
    for linear in (model.audio_projector.linear_1, model.audio_projector.linear_2):
        assert std(linear.weight) > 0 and not linear.bias.any()


def test_missing_weights_depend_on_the_seed_alone(bare_dir):
    prefixes = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        prefixes.append(LlavaAudioForConditionalGeneration.from_pretrained(bare_dir).model.prefix.weight)
    assert torch.equal(prefixes[0], prefixes[1]) and not torch.equal(prefixes[0], prefixes[2])


def test_half_precision_loads_and_captions(tiny_model_dir, tiny_processor):
    model = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    prompt = tiny_processor.format_prompt(SOUND_PROMPT, audio=True, prefix=True)
    sound = np.sin(np.arange(16_000) / 7).astype(np.float32)
    inputs = tiny_processor(text=prompt, audio=sound, return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
