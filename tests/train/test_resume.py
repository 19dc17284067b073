"""Resuming: an interrupted run ends with the weights of an unbroken one, and bad checkpoints are reported."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from dali_llava.train.losses import LOSSES
from dali_llava.train.losses.attentive import ATTENTION_WEIGHTS
from dali_llava.train.trainers.objective import OBJECTIVE_WEIGHTS


BEFORE = {
    "prefix": "captioner",
    "tower": "prefix",
    "aligned": "prefix",
    "distilled": "aligned",
    "supervised": "aligned",
    "lavcap": "aligned",
}
# name: stage and its words
RUNS = {
    "prefix": ("prefix", []),
    "tower": ("tower", []),
    "distilled": ("distilled", []),
    "supervised": ("supervised", ["--train_parts", "audio_projector", "audio_tower"]),
    "lavcap": ("lavcap", []),
} | {objective: ("aligned", ["--objective", objective, "--schedule_epochs", "3"]) for objective in LOSSES}
STEPS = 6  # of four batches per epoch, or one in prefix tuning


def words(run: str) -> list[str]:
    return [*RUNS[run][1], "--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "1"]


@pytest.fixture(scope="module")
def unbroken(run_stage, run_dir, tmp_path_factory):
    """`unbroken(run)`: folder of a run of `RUNS` with a checkpoint after each step. Read-only."""
    folder, done = tmp_path_factory.mktemp("unbroken"), set()

    def unbroken(run: str) -> Path:
        if run not in done:
            stage, _ = RUNS[run]
            run_stage(stage, run_dir / BEFORE[stage], folder / run, *words(run))
            done.add(run)
        return folder / run

    return unbroken


def resume(run_stage, run_dir, run: str, folder: Path, *more: str):
    stage, _ = RUNS[run]
    return run_stage(stage, run_dir / BEFORE[stage], folder, *words(run), "--resume_from_checkpoint", "true", *more)


def assert_same_weights(first: Path, second: Path) -> None:
    for name in ("stage.safetensors", ADAPTER_SAFE_WEIGHTS_NAME, OBJECTIVE_WEIGHTS, ATTENTION_WEIGHTS):
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            one, other = load_file(first / name), load_file(second / name)
            assert set(one) == set(other)
            assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("run", RUNS)
def test_resumed_run_ends_with_the_weights_of_an_unbroken_one(unbroken, run_stage, run_dir, tmp_path, run, step):
    """Step 3 is in the middle of an epoch, step 4 at its end."""
    done = unbroken(run)
    shutil.copytree(done / f"checkpoint-{step}", tmp_path / run / f"checkpoint-{step}")
    if (done / "pseudo_captions.parquet").exists():
        shutil.copy(done / "pseudo_captions.parquet", tmp_path / run)
    trainer = resume(run_stage, run_dir, run, tmp_path / run)
    assert trainer.state.global_step == STEPS
    assert [entry["step"] for entry in trainer.state.log_history if "train_runtime" in entry] == [STEPS]
    assert_same_weights(done, tmp_path / run)
