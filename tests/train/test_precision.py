"""Precision and memory: 16-bit bases, autocast, attention, checkpointing, compilation and accumulation."""

import json
import math
import shutil
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils import is_flash_attn_2_available

from dali_llava.eval.captioner import load_captioner
from dali_llava.modeling import LlavaAudioForConditionalGeneration, LlavaAudioTowers
from dali_llava.modeling.modeling_cav_mae import CavMaeMLP
from dali_llava.modeling.modeling_llava_audio import cast_tokens
from dali_llava.train.arguments import StageArguments
from dali_llava.train.base_model import load_base
from dali_llava.train.precision import frozen_dtype


# name: stage and its words
RUNS = {
    "prefix": ("prefix", []),
    "tower": ("tower", ["--augmentation_mix", "0"]),  # no sounds from other clips of a batch
    "mmd": ("aligned", ["--distance_steps", "0"]),
    "uncached": ("aligned", ["--distance_steps", "0", "--cache_features", "false"]),
    "ot_att": ("aligned", ["--distance_steps", "0", "--objective", "ot_att", "--schedule_epochs", "1"]),
    "distilled": ("distilled", []),
}
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in {field.name for field in fields(TrainingArguments)}:
    CHECKPOINTING = "gradient_checkpointing"  # earlier versions of transformers


@dataclass
class Run:
    """A finished run: its folder, its losses by step, its model, and the weights it saved."""

    folder: Path
    losses: list[float]
    model: nn.Module
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(run_dir, tmp_path_factory) -> dict[str, Path]:
    """The aligned model of the run, as one checkpoint in each dtype."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("float32", *HALF):
        model, processor = load_captioner(str(run_dir / "aligned"), dtype=name)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {name: folder / name for name in ("float32", *HALF)}


@pytest.fixture(scope="module")
def train(run_stage, run_dir, tmp_path_factory):
    """`train(run, base, *words)`: the `Run` of two steps of a stage of `RUNS`. Equal calls share it."""
    done = {}

    def train(run: str, base: Path, *words: str) -> Run:
        if (run, base, words) not in done:
            stage, own = RUNS[run]
            folder = tmp_path_factory.mktemp(run)
            if stage == "distilled":
                own = [*own, "--captions", str(run_dir / "distilled" / "pseudo_captions.parquet")]
            trainer = run_stage(stage, base, folder, *own, "--logging_steps", "1", *words)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            weights = trainer.pretrained.own_names(load_file(folder / "stage.safetensors"))
            done[run, base, words] = Run(folder, losses, trainer.pretrained, weights)
        return done[run, base, words]

    return train


# A base in 16 bit


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 1e-3)])
@pytest.mark.parametrize("run", ["prefix", "uncached", "ot_att", "distilled"])
def test_stage_on_a_16_bit_base_trains_in_float32(train, bases, run, dtype, tolerance):
    half = train(run, bases[dtype])
    whole = train(run, bases[dtype], "--frozen_dtype", "float32")
    assert len(half.losses) == 2
    assert half.losses == pytest.approx(whole.losses, rel=tolerance)
    stored = half.model.own_names(load_file(bases[dtype] / "model.safetensors"))
    changed = []
    for name, weight in half.model.named_parameters():
        if weight.requires_grad:
            assert weight.dtype == half.weights[name].dtype == torch.float32
            assert torch.equal(weight, half.weights[name])
            changed.append((weight != stored[name].float()).flatten())
        else:
            assert weight.dtype == HALF[dtype]
            assert torch.equal(weight, stored[name])
    assert {name for name, weight in half.model.named_parameters() if weight.requires_grad} == set(half.weights)
    assert torch.cat(changed).float().mean() > 0.99


@pytest.mark.parametrize(("base", "frozen"), [("float32", "float32"), ("float16", "bfloat16")])
@pytest.mark.parametrize("run", ["prefix", "uncached", "distilled"])
def test_autocast_computes_in_bfloat16(train, bases, run, base, frozen):
    """A float16 base is converted: its weights do not run under bfloat16 autocast."""
    autocast = train(run, bases[base], "--bf16", "true")
    whole = train(run, bases[base], "--frozen_dtype", "float32")
    assert autocast.losses != whole.losses
    assert autocast.losses == pytest.approx(whole.losses, rel=1e-2)
    dtypes = {weight.requires_grad: weight.dtype for weight in autocast.model.parameters()}
    assert dtypes == {True: torch.float32, False: getattr(torch, frozen)}
    assert {weight.dtype for weight in autocast.weights.values()} == {torch.float32}


@pytest.mark.parametrize("words", [[], ["--frozen_dtype", "float32"], ["--bf16", "true"]])
def test_stage_is_loaded_in_the_dtype_of_its_base(train, bases, run_dir, words):
    """Whatever the dtype of the frozen parts was in training."""
    folder = train("uncached", bases["float16"], *words).folder
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    model, processor = load_captioner(str(folder))
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    inputs = processor(
        text=processor.format_prompt("what is heard", audio=True),
        audio=[torch.zeros(16_000).numpy()],
        return_tensors="pt",
    )
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_trained_part_of_a_stage_is_loaded_without_rounding(train, bases):
    folder = train("tower", bases["float16"]).folder
    stored = {name: weight for name, weight in load_file(folder / "stage.safetensors").items()}
    arguments = StageArguments(base_model=str(folder), output_dir=str(folder), use_cpu=True)
    towers, _ = load_base(arguments, LlavaAudioTowers, trained=["audio_tower"])
    for name, weight in towers.audio_tower.named_parameters():
        assert torch.equal(weight, stored[f"model.audio_tower.{name}"])
    assert {weight.dtype for weight in towers.vision_tower.parameters()} == {torch.float16}
    rounded, _ = load_base(arguments, LlavaAudioTowers)
    for name, weight in rounded.audio_tower.named_parameters():
        assert torch.equal(weight, stored[f"model.audio_tower.{name}"].half())


@pytest.mark.parametrize("run", ["prefix", "ot_att"])
def test_resumed_run_on_a_16_bit_base_keeps_float32(train, run_stage, bases, run, tmp_path):
    words = ["--save_strategy", "steps", "--save_steps", "1"]
    unbroken = train(run, bases["float16"], *words)
    shutil.copytree(unbroken.folder / "checkpoint-1", tmp_path / "checkpoint-1")
    stage, own = RUNS[run]
    more = ["--logging_steps", "1", *words, "--resume_from_checkpoint", "true"]
    run_stage(stage, bases["float16"], tmp_path, *own, *more)
    resumed = load_file(tmp_path / "stage.safetensors")
    for name, weight in load_file(unbroken.folder / "stage.safetensors").items():
        assert torch.equal(resumed[name], weight)


@pytest.mark.parametrize(
    ("frozen", "autocast", "stored", "expected"),
    [
        ("auto", "no", torch.float16, "auto"),
        ("auto", "bf16", torch.float16, torch.bfloat16),
        ("auto", "fp16", torch.bfloat16, torch.float16),
        ("auto", "bf16", torch.float32, "auto"),
        ("auto", "bf16", None, "auto"),
        ("float32", "bf16", torch.float16, "float32"),
        ("bfloat16", "no", torch.float16, "bfloat16"),
    ],
)
def test_frozen_dtype(tmp_path, frozen, autocast, stored, expected):
    arguments = StageArguments(output_dir=str(tmp_path), use_cpu=True, frozen_dtype=frozen)
    arguments.mixed_precision = autocast
    assert frozen_dtype(arguments, stored) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frozen_dtype", "int8"], "frozen_dtype: unknown dtype 'int8'; known: auto, float32, bfloat16, float16"),
        (["--fp16", "true"], "fp16: a CPU has no float16 autocast; use --bf16 true"),
        (["--bf16", "true", "--frozen_dtype", "float16"], "frozen_dtype: float16 does not run under bf16 autocast"),
        (["--attn_implementation", "flash_attention_2"], "attn_implementation: flash_attention_2 .* add --bf16 true"),
        (["--attn_implementation", "fast"], 'attn_implementation: .*"fast"'),
    ],
)
def test_bad_precision_is_reported_before_loading(run_stage, run_dir, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("dali_llava.train.base_model.load_captioner", None)
    with pytest.raises(ValueError, match=message):
        run_stage("prefix", run_dir / "captioner", tmp_path, *words)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_missing_package_of_an_attention_is_reported_before_loading(run_stage, run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("dali_llava.train.base_model.load_captioner", None)
    words = ["--attn_implementation", "flash_attention_2", "--bf16", "true"]
    with pytest.raises(ImportError, match="attn_implementation: .*[Ff]lash"):
        run_stage("prefix", run_dir / "captioner", tmp_path, *words)


class Packed(nn.Module):
    """A quantised linear layer: its weight is packed as integers or float8."""

    def __init__(self, weight: torch.dtype, bias: torch.dtype | None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4).to(weight), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(torch.zeros(4, dtype=bias))


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, None, torch.float16),
        (torch.uint8, torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16, torch.float16),
        (torch.int8, None, torch.float64),
    ],
)
def test_projector_receives_tokens_in_the_dtype_of_its_weights(weight, bias, expected):
    tokens = torch.ones(1, 2, 3, dtype=torch.float64)
    (cast,) = cast_tokens(Packed(weight, bias), (tokens,))
    assert cast.dtype == expected
    assert torch.equal(cast, tokens.to(expected))


# Attention, checkpointing, compilation, accumulation: the weights of an ordinary run


@pytest.mark.parametrize("run", ["prefix", "tower", "mmd", "distilled"])
def test_eager_attention_and_sdpa_agree(train, bases, run):
    eager = train(run, bases["float32"], "--attn_implementation", "eager")
    sdpa = train(run, bases["float32"], "--attn_implementation", "sdpa")
    for found, name in ((eager, "eager"), (sdpa, "sdpa")):
        towers = [module.config for module in found.model.modules() if hasattr(module, "_attn_implementation")]
        assert {config._attn_implementation for config in [found.model.config, *towers]} == {name}
    assert eager.losses == pytest.approx(sdpa.losses, rel=1e-5)
    torch.testing.assert_close(eager.weights, sdpa.weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("run", "recomputed", "once"),
    [
        ("prefix", {LlamaMLP}, {CLIPMLP}),
        ("tower", {CavMaeMLP}, set()),
        ("uncached", {CavMaeMLP}, {CLIPMLP}),
        ("distilled", {LlamaMLP}, {CavMaeMLP}),
    ],
)
def test_checkpointing_recomputes_only_what_has_gradients(train, bases, monkeypatch, run, recomputed, once):
    """The towers that are frozen build no autograd graph, so they compute once."""
    calls = {}

    def count(kind, forward, self, *args):
        calls[kind] = calls.get(kind, 0) + 1
        return forward(self, *args)

    for kind in recomputed | once:
        monkeypatch.setattr(kind, "forward", partial_method(count, kind, kind.forward))
    plain = train(run, bases["float32"], "--weight_decay", "0")  # words that no other test uses
    before = dict(calls)
    calls.clear()
    checkpointed = train(run, bases["float32"], "--weight_decay", "0", f"--{CHECKPOINTING}", "true")
    assert set(calls) == recomputed | once
    for kind in recomputed:
        assert calls[kind] == 2 * before[kind]
    for kind in once:
        assert calls[kind] == before[kind]
    assert checkpointed.losses == plain.losses
    torch.testing.assert_close(checkpointed.weights, plain.weights, rtol=0, atol=0)


def partial_method(function, *first):
    """A function that calls `function(*first, self, *args)`, usable as a method."""
    bound = partial(function, *first)
    return lambda self, *args: bound(self, *args)


@pytest.mark.parametrize("run", ["prefix", "tower", "mmd", "distilled"])
def test_two_accumulated_batches_equal_one_batch(train, bases, run):
    """Also for captions of different lengths: the loss is a mean over the tokens of both batches."""
    words = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    accumulated, whole = train(run, bases["float32"], *words), train(run, bases["float32"])
    assert accumulated.losses == pytest.approx(whole.losses, rel=1e-5)
    torch.testing.assert_close(accumulated.weights, whole.weights, rtol=0, atol=1e-4)


def test_compiled_stage_saves_the_same_weights(train, bases):
    compiled = train("tower", bases["float32"], "--torch_compile_backend", "eager")
    plain = train("tower", bases["float32"])
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    torch.testing.assert_close(compiled.weights, plain.weights, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["prefix", "tower", "mmd", "ot_att", "distilled"])
def test_stage_compiled_with_its_gradients_saves_the_same_weights(train, bases, run):
    compiled = train(run, bases["float32"], "--torch_compile_backend", "aot_eager")
    plain = train(run, bases["float32"])
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    torch.testing.assert_close(compiled.weights, plain.weights, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("run", ["tower", "mmd"])
def test_stage_compiled_by_inductor_saves_the_same_weights(train, bases, run):
    compiled = train(run, bases["float32"], "--torch_compile", "true")
    plain = train(run, bases["float32"])
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    torch.testing.assert_close(compiled.weights, plain.weights, rtol=0, atol=1e-3)


def test_captioner_of_avworld_trains_with_all_options(run_stage, tmp_path):
    words = ["--attn_implementation", "eager", f"--{CHECKPOINTING}", "true", "--bf16", "true"]
    trainer = run_stage("captioner", None, tmp_path, *words)
    assert trainer.pretrained.config.text_config._attn_implementation == "eager"
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    saved = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    LlavaAudioForConditionalGeneration.from_pretrained(tmp_path)
