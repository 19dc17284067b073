"""Two processes with half of each batch train the weights of one process with the whole batch, under every engine."""

import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.train.data.collators import SupervisedCollator
from dali_llava.train.losses import LOSSES
from dali_llava.train.losses.attentive import ATTENTION_WEIGHTS


BEFORE = {
    "prefix": "captioner",
    "tower": "prefix",
    "aligned": "prefix",
    "distilled": "aligned",
    "supervised": "aligned",
    "lavcap": "aligned",
}
COMMON = [
    *("--max_steps", "6", "--learning_rate", "2e-3", "--lr_scheduler_type", "constant", "--warmup_steps", "0"),
    # Adam divides a gradient by its magnitude. If it is as small as float32's rounding error, the error becomes a
    # full step.
    *("--adam_epsilon", "1e-5"),
]
ALIGNMENT = [
    # Epochs 1 to 3: from the third step on, lambda applies and the attention learns.
    *("--schedule_epochs", "3", "--objective_learning_rate", "2e-3"),
]
OPTIONS = {
    "ot": ["--transport_micro_batches", "2"],  # the towers run twice before the backward pass
    "ot_att": ["--objective_options", '{"temperature": 0.2}'],  # with 20, the attention would hardly change
    "token_assignment": ["--max_steps", "24"],  # its gradients are small, as those of the tower below
}
RUNS = {
    "prefix": ("prefix", []),
    # Its gradients are small relative to COMMON's epsilon, so that every weight changes only after more steps.
    # A process mixes the clips of its own half of the batch only.
    "tower": ("tower", ["--augmentation_mix", "0", "--max_steps", "18"]),
    "distilled": ("distilled", []),
    # One process may have images or sounds only. DDP does not search for parameters without gradient.
    "supervised": (
        "supervised",
        [
            *("--modalities", "audio", "image", "--ddp_find_unused_parameters", "false", "--train_parts"),
            *("audio_projector", "audio_tower", "multi_modal_projector"),
        ],
    ),
    # One process may have no pair of audio and image, so that the temperature has no gradient there.
    "lavcap": (
        "lavcap",
        [
            *("--modalities", "audio", "audiovisual", "--ddp_find_unused_parameters", "false", "--lora", "none"),
            *("--fusion", "cross_attention", "--fusion_options", '{"num_attention_heads": 4}'),
            *("--ot_options", '{"rescale": true}', "--train_parts", "audio_projector", "fusion", "audio_tower"),
        ],
    ),
} | {
    objective: ("aligned", [*ALIGNMENT, "--objective", objective, *OPTIONS.get(objective, [])]) for objective in LOSSES
}
# Runs with half of the batch per process, in two parts.
ACCUMULATED = {f"{name}_accumulated": RUNS[name] for name in ("prefix", "mmd", "ot", "distilled")}
ALL = RUNS | ACCUMULATED
LEAST = {"supervised": 5e-5, "lavcap": 5e-5}  # change of a weight; gradients of the tower's last layers are small here
ENGINES = {
    "ddp_8gpu": ("DistributedDataParallel", ("AdamW", "Adam", "SGD")),
    "zero2": ("DeepSpeedEngine", ("DeepSpeedZeroOptimizer",)),
    "zero3": ("DeepSpeedEngine", ("DeepSpeedZeroOptimizer_Stage3",)),
    "zero3_offload": ("DeepSpeedEngine", ("DeepSpeedZeroOptimizer_Stage3",)),
    "fsdp2": ("FSDP", ("AdamW", "Adam", "SGD")),
}
SHARDED = [engine for engine in ENGINES if engine != "ddp_8gpu"]
FAST = {"ddp_8gpu": list(RUNS), "zero3": ["ot_att"], "fsdp2": ["distilled"]}
CELLS = [
    pytest.param(engine, name, marks=() if name in FAST.get(engine, ()) else pytest.mark.slow)
    for engine in ENGINES
    for name in ALL
]
# The layers of the towers and of the language model, each of which is a unit of FSDP2.
LAYERS = {"CavMaeLayer", "CLIPEncoderLayer", "LlamaDecoderLayer"}


@pytest.fixture(scope="module")
def alone(run_dir, run_stage, tmp_path_factory):
    """`alone(name)`: folder of a run of `ALL` by one process, and its last log entry."""
    folder, logged = tmp_path_factory.mktemp("alone"), {}

    def alone(name: str) -> tuple[Path, dict]:
        name = name.removesuffix("_accumulated")
        if name not in logged:
            stage, own = RUNS[name]
            words = [*COMMON, *own, "--per_device_train_batch_size", "4"]
            history = run_stage(stage, run_dir / BEFORE[stage], folder / name, *words).state.log_history
            logged[name] = [entry for entry in history if "loss" in entry][-1]
        return folder / name, logged[name]

    return alone


@pytest.fixture(scope="module")
def shared(run_dir, stage_words, launch_stages, tmp_path_factory):
    """`shared(engine, name)`: folder of a run of `ALL` by two processes, and what ran. Slow runs start together."""
    done = {}

    def shared(engine: str, name: str) -> tuple[Path, dict]:
        if (engine, name) not in done:
            fast, folder = FAST.get(engine, []), tmp_path_factory.mktemp(engine)
            runs = {}
            for each in fast if name in fast else ALL.keys() - set(fast):
                stage, own = ALL[each]
                batch = ["--per_device_train_batch_size", "2"]
                if each in ACCUMULATED:
                    batch = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
                runs[each] = (stage, stage_words(stage, run_dir / BEFORE[stage], folder / each, *COMMON, *own, *batch))
            ran = launch_stages(engine, runs, folder)
            done.update({(engine, each): (folder / each, ran[each]) for each in runs})
        return done[engine, name]

    return shared


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert set(first) == set(second)
    return max((first[name] - second[name]).abs().max().item() for name in first)


def assert_engine(engine: str, ran: dict) -> None:
    """The engine that was requested ran in two processes, and sharded what it shards."""
    wrapper, optimizers = ENGINES[engine]
    assert ran["engine"].startswith(wrapper)
    assert (ran["optimizer"] in optimizers, ran["processes"]) == (True, 2)
    assert ran["trained_dtypes"] == ["torch.float32"]
    assert ran["sharded"] == (ran["parameters"] if engine.startswith(("zero3", "fsdp")) else 0)
    if engine == "zero2":  # each process holds half of the optimizer's state
        assert ran["optimizer_elements"] == pytest.approx(ran["elements"] / 2, abs=2)
    assert LAYERS & set(ran["units"]) == (LAYERS & set(ran["modules"]) if engine == "fsdp2" else set())


@pytest.mark.parametrize(("engine", "name"), CELLS)
def test_two_processes_train_the_weights_of_one(alone, shared, run_dir, engine, name):
    (one, _), (two, ran) = alone(name), shared(engine, name)
    assert_engine(engine, ran)
    first, second = (load_file(folder / "stage.safetensors") for folder in (one, two))
    assert {tensor.dtype for tensor in second.values()} == {torch.float32}
    assert largest_difference(first, second) <= 1e-5
    before = BEFORE[ALL[name][0]]
    start = LlavaAudioForConditionalGeneration.from_pretrained(run_dir / before).state_dict()
    # A fusion is not in the base.
    moved = {key: (tensor - start[key]).abs().max().item() for key, tensor in first.items() if key in start}
    # the bias of a key has no gradient except for rounding
    assert min(moved[key] for key in moved if not key.endswith("k_proj.bias")) > LEAST.get(name, 1e-3)


def test_two_processes_train_the_temperature_of_one(alone, shared):
    first, second = (
        load_file(run[0] / "objective.safetensors") for run in (alone("lavcap"), shared("ddp_8gpu", "lavcap"))
    )
    assert set(first) == {"log_scale"} and first["log_scale"].item() != pytest.approx(math.log(1 / 0.07), abs=1e-4)
    assert largest_difference(first, second) <= 1e-5


def test_processes_of_the_supervised_run_have_other_modalities(run_dir, run_stage, tmp_path, monkeypatch):
    """
    In one step, one process has images only, and the other one sounds only.

    In every step, the whole batch has both: one process skips the update of weights without gradient, but two
    processes update them with a gradient of zero.
    """
    batches, collate = [], SupervisedCollator.__call__

    def recorded(self, rows):
        batch = collate(self, rows)
        sounds = batch["input_ids"] == self.processor.tokenizer.convert_tokens_to_ids("<audio>")
        batches.append(sounds.any(1).tolist())
        return batch

    monkeypatch.setattr(SupervisedCollator, "__call__", recorded)
    words = [*COMMON, *RUNS["supervised"][1], "--per_device_train_batch_size", "4"]
    run_stage("supervised", run_dir / "aligned", tmp_path, *words)
    assert len(batches) >= 6 and all(len(set(batch)) == 2 for batch in batches[:6])
    assert any(first == second != third == fourth for first, second, third, fourth in batches[:6])


@pytest.mark.parametrize(
    "engine",
    [pytest.param(e, marks=() if "ot_att" in FAST.get(e, ()) else pytest.mark.slow) for e in ENGINES],
)
def test_two_processes_train_the_attention_of_one(alone, shared, run_stage, run_dir, tmp_path, engine):
    first, second = (load_file(run[0] / ATTENTION_WEIGHTS) for run in (alone("ot_att"), shared(engine, "ot_att")))
    # Its gradient is zero in epoch 1: after one step, the weights are the initial ones.
    run_stage("aligned", run_dir / "prefix", tmp_path, *COMMON, *RUNS["ot_att"][1], "--max_steps", "1")
    start = load_file(tmp_path / ATTENTION_WEIGHTS)
    assert largest_difference(first, second) <= 1e-5
    moved = {key: (tensor - start[key]).abs().max().item() for key, tensor in first.items()}
    # biases that shift the scores of all tokens equally have no gradient
    assert min(moved[key] for key in moved if key.endswith("weight")) > 1e-4


def test_two_processes_generate_the_pseudo_captions_of_one(alone, shared):
    runs = alone("distilled"), shared("ddp_8gpu", "distilled")
    first, second = (pq.read_table(run[0] / "pseudo_captions.parquet") for run in runs)
    assert first.num_rows == 8
    assert first.equals(second)


@pytest.mark.parametrize("name", ["mmd", "ot", "ot_att"])
def test_two_processes_log_the_parts_of_one(alone, shared, name):
    first, second = alone(name)[1], shared("ddp_8gpu", name)[1]["logged"]
    assert first.keys() == second.keys() >= {"clips_per_second", "memory_gb", "token_mmd", "token_sliced_wasserstein"}
    # max_gap is the largest of a batch, and the batches differ.
    own = {"epoch", "step", "clips_per_second", "memory_gb", "transport_share", "max_gap"}
    expected = {key: value for key, value in first.items() if key not in own}
    assert {key: second[key] for key in expected} == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_run_ends_with_the_weights_of_an_unbroken_one(run_dir, stage_words, launch_stages, tmp_path, engine):
    """Checkpoint 3 is in the middle of an epoch of the alignment."""
    names = ["prefix", "ot_att"]

    def runs(folder: Path, *more: str) -> dict:
        saving = [
            *COMMON,
            "--per_device_train_batch_size",
            "2",
            "--save_strategy",
            "steps",
            "--save_steps",
            "3",
            *more,
        ]
        return {
            name: (RUNS[name][0], stage_words(RUNS[name][0], run_dir / BEFORE[RUNS[name][0]], folder / name, *saving))
            for name in names
        }

    launch_stages(engine, runs(tmp_path / "unbroken"), tmp_path)
    for name in names:
        shutil.copytree(tmp_path / "unbroken" / name / "checkpoint-3", tmp_path / "resumed" / name / "checkpoint-3")
    ran = launch_stages(engine, runs(tmp_path / "resumed", "--resume_from_checkpoint", "true"), tmp_path)
    for name in names:
        assert_engine(engine, ran[name])
        for file in (tmp_path / "unbroken" / name).glob("*.safetensors"):
            first, second = load_file(file), load_file(tmp_path / "resumed" / name / file.name)
            assert first.keys() == second.keys()
            assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_weights_are_those_of_one_process(run_dir, run_stage, stage_words, launch_stages, tmp_path, engine):
    """The checkpoint with the largest loss counts as the best one, so that it is not the last one."""
    strategy = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    own = [*COMMON, *strategy, "--eval_split", "shots", "--load_best_model_at_end", "true", "--learning_rate", "0.5"]
    own += ["--metric_for_best_model", "loss", "--greater_is_better", "true"]
    words = [*own, "--per_device_train_batch_size"]
    one = run_stage("prefix", run_dir / "captioner", tmp_path / "one", *words, "4")
    shared_words = stage_words("prefix", run_dir / "captioner", tmp_path / "two", *words, "2")
    ran = launch_stages(engine, {"best": ("prefix", shared_words)}, tmp_path)["best"]
    assert_engine(engine, ran)
    assert ran["best"] == one.state.best_global_step < 6
    first, second = (load_file(tmp_path / name / "stage.safetensors") for name in ("one", "two"))
    assert largest_difference(first, second) <= 1e-5
    assert (
        largest_difference(second, load_file(tmp_path / "two" / f"checkpoint-{ran['best']}" / "stage.safetensors"))
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parts_keep_16_bit_under_autocast(run_dir, run_stage, stage_words, launch_stages, tmp_path, engine):
    """Without Adam's division, the change of a weight is its gradient, which autocast rounds to eight bits."""
    base = tmp_path / "base"
    shutil.copytree(run_dir / "captioner", base)
    captioner = LlavaAudioForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    captioner.save_pretrained(base)
    own = [*COMMON, "--bf16", "true", "--optim", "sgd", "--learning_rate", "1", "--max_steps", "2"]
    words = [*own, "--max_grad_norm", "0", "--per_device_train_batch_size"]
    run_stage("prefix", base, tmp_path / "one", *words, "4")
    ran = launch_stages(
        engine, {"prefix": ("prefix", stage_words("prefix", base, tmp_path / "two", *words, "2"))}, tmp_path
    )["prefix"]
    assert_engine(engine, ran)
    assert ran["frozen_dtypes"] == ["torch.bfloat16"]
    start = captioner.model.prefix.weight.float()
    first, second = (
        load_file(tmp_path / name / "stage.safetensors")["model.prefix.weight"] for name in ("one", "two")
    )
    assert second.dtype == torch.float32
    assert (first - second).norm() < 0.02 * (first - start).norm()
