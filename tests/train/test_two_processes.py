"""Two processes with half of each batch train the same weights as one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.train.losses import LOSSES
from dali_llava.train.losses.attentive import ATTENTION_WEIGHTS


pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)

DRIVER = Path(__file__).with_name("stages_driver.py")
# stage: its module and the previous stage
STAGES = {
    "prefix": ("dali_llava.train.prefix_tune", "captioner"),
    "tower": ("dali_llava.train.avworld.pretrain_tower", "prefix"),
    "aligned": ("dali_llava.train.align", "prefix"),
    "distilled": ("dali_llava.train.distill", "aligned"),
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
} | {
    objective: ("aligned", [*ALIGNMENT, "--objective", objective, *OPTIONS.get(objective, [])]) for objective in LOSSES
}


def launch(listing: Path, cache: Path) -> list[dict]:
    """Runs the stages in `listing` in two processes and returns what the first process printed about each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, DRIVER, listing], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]


@pytest.fixture(scope="module")
def outputs(run_dir, run_stage, stage_words, datasets_cache, tmp_path_factory) -> tuple[Path, Path]:
    """Folders with a checkpoint for each of `RUNS`, trained by one process and by two, and their last log entries."""
    alone, shared = (tmp_path_factory.mktemp(name) for name in ("alone", "shared"))
    listed, logged = {}, {}
    for name, (stage, own) in RUNS.items():
        for folder in (alone, shared):
            (folder / name).mkdir()
        module, before = STAGES[stage]
        words = [*COMMON, *own, "--per_device_train_batch_size"]
        history = run_stage(stage, run_dir / before, alone / name, *words, "4").state.log_history
        logged[name] = [entry for entry in history if "loss" in entry][-1]
        listed[name] = [module, stage_words(stage, run_dir / before, shared / name, *words, "2")]
    (shared / "stages.json").write_text(json.dumps(listed))
    ran = launch(shared / "stages.json", datasets_cache)
    (alone / "logged.json").write_text(json.dumps(logged))
    (shared / "logged.json").write_text(json.dumps({each["name"]: each.pop("logged") for each in ran}))
    assert ran == [{"name": name, "processes": 2, "mode": "distributed", "backend": "gloo"} for name in RUNS]
    return alone, shared


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert set(first) == set(second)
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_the_weights_of_one(outputs, run_dir, name):
    alone, shared = (load_file(folder / name / "stage.safetensors") for folder in outputs)
    assert {tensor.dtype for tensor in alone.values()} == {torch.float32}
    assert largest_difference(alone, shared) <= 1e-5
    _, before = STAGES[RUNS[name][0]]
    start = LlavaAudioForConditionalGeneration.from_pretrained(run_dir / before).state_dict()
    moved = {key: (tensor - start[key]).abs().max().item() for key, tensor in alone.items()}
    # the bias of a key has no gradient except for rounding
    assert min(moved[key] for key in moved if not key.endswith("k_proj.bias")) > 1e-3


def test_two_processes_generate_the_pseudo_captions_of_one(outputs):
    alone, shared = (pq.read_table(folder / "distilled" / "pseudo_captions.parquet") for folder in outputs)
    assert alone.num_rows == 8
    assert alone.equals(shared)


def test_two_processes_train_the_attention_of_one(outputs, run_stage, run_dir, tmp_path):
    alone, shared = (load_file(folder / "ot_att" / ATTENTION_WEIGHTS) for folder in outputs)
    # Its gradient is zero in epoch 1: after one step, the weights are the initial ones.
    run_stage("aligned", run_dir / "prefix", tmp_path, *COMMON, *RUNS["ot_att"][1], "--max_steps", "1")
    start = load_file(tmp_path / ATTENTION_WEIGHTS)
    assert largest_difference(alone, shared) <= 1e-5
    moved = {key: (tensor - start[key]).abs().max().item() for key, tensor in alone.items()}
    # biases that shift the scores of all tokens equally have no gradient
    assert min(moved[key] for key in moved if key.endswith("weight")) > 1e-4


@pytest.mark.parametrize("name", ["mmd", "ot", "ot_att"])
def test_two_processes_log_the_parts_of_one(outputs, name):
    alone, shared = (json.loads((folder / "logged.json").read_text())[name] for folder in outputs)
    assert alone.keys() == shared.keys() >= {"clips_per_second", "memory_gb", "token_mmd", "token_sliced_wasserstein"}
    # max_gap is the largest of a batch, and the batches differ.
    own = {"epoch", "step", "clips_per_second", "memory_gb", "transport_share", "max_gap"}
    expected = {key: value for key, value in alone.items() if key not in own}
    assert {key: shared[key] for key in expected} == pytest.approx(expected, rel=1e-3)
