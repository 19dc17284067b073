"""Distillation with adapters, from the command line to the merged checkpoint, and which layers they adapt."""

import copy
import json
import re
import shutil
from hashlib import sha256

import pytest
import torch

from dali_llava.cli import main
from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.modeling.pretrained_llava_audio import LlavaAudioPreTrainedModel
from dali_llava.modeling.stage_checkpoint import find_stage
from dali_llava.processing.corpora.rows import open_audio
from dali_llava.train.adapters import adapter_config, add_adapter, target_pattern
from dali_llava.train.arguments import AdapterArguments
from dali_llava.train.base_model import train_only


peft = pytest.importorskip("peft", reason="peft is not installed")

LORA = ["--lora", "language_model", "audio_tower", "--lora_rank", "4", "--learning_rate", "0.02"]


def load(folder) -> LlavaAudioForConditionalGeneration:
    return LlavaAudioForConditionalGeneration.from_pretrained(folder).eval()


def digests(folder) -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def distil(run_stage, run_dir):
    """`distil(output, *overrides)`: distils the aligned model with the captions of the run; returns the trainer."""

    def distil(output, *overrides: str):
        output.mkdir()
        shutil.copy(run_dir / "distilled" / "pseudo_captions.parquet", output)
        return run_stage("distilled", run_dir / "aligned", output, *LORA, *overrides)

    return distil


@pytest.fixture(scope="module")
def adapted(distil, run_dir, tmp_path_factory):
    """Folder of a distilled stage with adapters, its trainer, and whether the run's other files are unchanged."""
    folder = tmp_path_factory.mktemp("adapted") / "stage"
    before = digests(run_dir)
    trainer = distil(folder)
    return folder, trainer, digests(run_dir) == before


@pytest.fixture
def inputs(avworld_processor, rows) -> dict[str, torch.Tensor]:
    """Four sounds with the question about them."""
    text = [avworld_processor.format_prompt(row["question"], audio=True) for row in rows]
    return avworld_processor(text=text, audio=[open_audio(row) for row in rows], return_tensors="pt", padding=True)


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model.eval()(**inputs).logits


def test_base_files_do_not_change(adapted):
    _, _, unchanged = adapted
    assert unchanged


def test_projector_and_adapters_are_trained_and_nothing_else(adapted, run_dir):
    folder, _, _ = adapted
    tensors = find_stage(folder).tensors()
    factors = {name for name in tensors if ".lora_" in name}
    projector = {name for name in tensors if name.startswith("model.audio_projector.")}
    assert tensors.keys() == factors | projector and len(projector) == 4
    layers = {name.partition(".lora_")[0] for name in factors}
    model = load(run_dir / "aligned")
    assert layers == {
        f"model.{part}.{name}"
        for part in ("language_model", "audio_tower")
        for name, module in model.model.get_submodule(part).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.any() for name, tensor in tensors.items() if name in factors)  # B starts at 0
    before = model.state_dict()
    assert all(not torch.equal(tensors[name], before[name]) for name in projector)


def test_stage_loads_as_it_was_trained(adapted, run_dir, inputs):
    folder, trainer, _ = adapted
    expected = logits(trainer.model, inputs)
    assert not torch.allclose(logits(load(run_dir / "aligned"), inputs), expected, atol=1e-2)
    torch.testing.assert_close(logits(load(folder), inputs), expected, rtol=0, atol=1e-5)
    with_peft = peft.PeftModel.from_pretrained(load(run_dir / "aligned"), folder)
    torch.testing.assert_close(logits(with_peft, inputs), expected, rtol=0, atol=1e-5)


def test_merged_checkpoint_stands_alone(adapted, inputs, tmp_path):
    folder, trainer, _ = adapted
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "model.safetensors" in names and not [name for name in names if name.startswith(("adapter_", "stage."))]
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, inputs), logits(trainer.model, inputs), rtol=0, atol=1e-5)
    assert not any("lora" in name for name in merged.state_dict())


def test_same_seed_gives_the_same_adapter(adapted, distil, tmp_path):
    folder, _, _ = adapted
    distil(tmp_path / "again")
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_gradient_checkpointing_gives_the_same_adapter(adapted, distil, tmp_path):
    folder, _, _ = adapted
    distil(tmp_path / "checkpointed", "--gradient_checkpointing", "true")
    expected = find_stage(folder).tensors()
    for name, tensor in find_stage(tmp_path / "checkpointed").tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_resumed_stage_ends_with_the_adapter_of_an_unbroken_one(adapted, distil, run_stage, run_dir, tmp_path):
    folder, _, _ = adapted
    distil(tmp_path / "run", "--save_strategy", "steps", "--save_steps", "1")
    for path in (tmp_path / "run").iterdir():
        if path.is_file() and path.suffix == ".safetensors":
            path.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    resumed = ["--save_strategy", "steps", "--save_steps", "1", "--resume_from_checkpoint", "true"]
    trainer = run_stage("distilled", run_dir / "aligned", tmp_path / "run", *LORA, *resumed)
    assert trainer.state.global_step == 2
    expected = find_stage(folder).tensors()
    for name, tensor in find_stage(tmp_path / "run").tensors().items():
        assert torch.equal(tensor, expected[name]), name


def test_next_stage_starts_from_the_merged_model(adapted, run_stage, inputs, tmp_path):
    folder, trainer, _ = adapted
    # The learning rate is so small that the weights do not change in float32.
    run_stage("prefix", folder, tmp_path / "next", "--learning_rate", "1e-12")
    torch.testing.assert_close(
        logits(load(tmp_path / "next"), inputs), logits(trainer.model, inputs), rtol=0, atol=1e-5
    )


def arguments(base, **others) -> AdapterArguments:
    found = AdapterArguments(**others)
    found.base_model = str(base)
    return found


def matched(captioner, pattern: str) -> set[str]:
    return {name for name, _ in captioner.named_modules() if re.fullmatch(pattern, name)}


def test_default_targets_are_the_linear_layers_of_the_part(captioner):
    pattern = target_pattern(captioner, ["audio_tower"])
    expected = {
        name
        for name, module in captioner.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.audio_tower.")
    }
    assert matched(captioner, pattern) == expected
    assert r"model\.audio_tower\.layers\.\d+\.attention\.q_proj" in pattern.split("|")
    both = matched(captioner, target_pattern(captioner, ["language_model", "audio_tower"]))
    assert not [name for name in both if "vision_tower" in name or "projector" in name or "lm_head" in name]
    assert expected < both


def test_targets_are_scoped_by_path(captioner):
    """The vision tower has layers of the same names."""
    found = matched(captioner, target_pattern(captioner, ["language_model"], ["self_attn.q_proj", "v_proj"]))
    layers = [f"model.language_model.layers.{index}.self_attn" for index in range(2)]
    assert found == {f"{layer}.{name}" for layer in layers for name in ("q_proj", "v_proj")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": ["vision_tower"]}, "lora: unknown part vision_tower; choose from language_model, audio_tower"),
        (
            {"lora": ["language_model"], "lora_targets": ["q_proj", "qproj"]},
            "lora_targets: qproj matches no linear layer of language_model; language_model has down_proj, gate_proj",
        ),
        (
            {"lora": ["language_model", "audio_tower"], "lora_targets": ["fc1"]},
            "lora_targets: fc1 matches no linear layer of language_model; .* audio_tower has fc1, fc2",
        ),
        ({"lora": ["language_model"], "lora_targets": ["embed_tokens"]}, "embed_tokens matches no linear layer"),
        ({"lora": ["language_model"], "lora_targets": ["roj"]}, "roj matches no linear layer"),
        ({"lora": ["language_model"], "lora_rank": 0}, "lora_rank: must be at least 1, not 0"),
        ({"lora": ["language_model"], "lora_alpha": 0.0}, "lora_alpha: must be positive, not 0.0"),
        ({"lora": ["language_model"], "lora_dropout": 1.0}, "lora_dropout: must be at least 0 and less than 1"),
    ],
)
def test_bad_argument_is_named_before_a_model_is_loaded(run_dir, monkeypatch, options, message):
    monkeypatch.setattr(LlavaAudioPreTrainedModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        adapter_config(arguments(run_dir / "aligned", **options))


def test_wrong_target_stops_the_stage_before_it_captions(run_stage, run_dir, tmp_path):
    words = ["--lora", "language_model", "--lora_targets", "qproj"]
    with pytest.raises(ValueError, match="qproj matches no linear layer"):
        run_stage("distilled", run_dir / "aligned", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_missing_package_is_named_with_its_extra(run_dir, monkeypatch):
    monkeypatch.setattr("dali_llava.train.adapters.is_peft_available", lambda: False)
    assert adapter_config(arguments(run_dir / "aligned")) is None
    with pytest.raises(ImportError, match=r'lora: needs peft.*pip install "dali-llava\[peft\]"'):
        adapter_config(arguments(run_dir / "aligned", lora=["audio_tower"]))


def test_adapters_on_a_16_bit_base_train_in_float32(captioner, run_dir, inputs):
    captioner.to(torch.bfloat16)
    train_only(captioner)
    add_adapter(
        captioner, adapter_config(arguments(run_dir / "captioner", lora=["language_model", "audio_tower"])), seed=0
    )
    captioner(**inputs).logits.float().square().mean().backward()
    trained = {name: weight for name, weight in captioner.named_parameters() if weight.requires_grad}
    assert trained and all(".lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert all(weight.grad.any() for name, weight in trained.items() if ".lora_B." in name)
    assert captioner.lm_head.weight.dtype == torch.bfloat16


def test_adapter_joins_what_is_trained(captioner, run_dir):
    train_only(captioner, captioner.model.audio_projector, captioner.model.prefix)
    config = adapter_config(arguments(run_dir / "captioner", lora=["audio_tower"], lora_targets=["fc1"]))
    add_adapter(captioner, config, seed=0)
    trained = {name.partition(".lora_")[0] for name, weight in captioner.named_parameters() if weight.requires_grad}
    blocks = ("layers.0", "layers.1", "joint_layers.0")
    layers = {f"model.audio_tower.{block}.mlp.fc1" for block in blocks}
    projector = {f"model.audio_projector.linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    assert trained == {"model.prefix.weight"} | layers | projector


def test_initial_values_depend_on_the_seed_alone(captioner, run_dir):
    config = adapter_config(arguments(run_dir / "captioner", lora=["audio_tower"], lora_targets=["fc1"]))
    copies = [copy.deepcopy(captioner) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(copies, (1, 1, 2), strict=True):
        train_only(model)
        add_adapter(model, config, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        state = torch.manual_seed(seed + 7).get_state()
    first, second, other = (model.model.audio_tower.layers[1].mlp.fc1.lora_A["default"].weight for model in copies)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_layer_cannot_be_trained_in_full_too(captioner, run_dir):
    train_only(captioner, captioner.model.audio_tower)
    with pytest.raises(ValueError, match=r"lora: model\.audio_tower\..* is already trained in full"):
        add_adapter(captioner, adapter_config(arguments(run_dir / "captioner", lora=["audio_tower"])), seed=0)


def test_saved_configuration_holds_the_arguments(adapted):
    folder, _, _ = adapted
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.0)
    assert config["modules_to_save"] == ["model.audio_projector.linear_1", "model.audio_projector.linear_2"]
