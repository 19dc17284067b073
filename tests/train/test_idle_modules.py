"""Two ranks whose batches have different modalities train the weights of one process with the joint batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dali_llava.modeling.idle_modules import must_run
from dali_llava.modeling.stage_checkpoint import load_stage_weights
from dali_llava.train.data.collators import SupervisedCollator


DRIVER = Path(__file__).with_name("engines_driver.py")
ENGINES = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP"}
# Both towers and both projectors take part; a rank has one clip per step, about which one question is asked.
WORDS = [
    *("--modalities", "audio", "image", "--train_parts", "audio_projector", "audio_tower", "multi_modal_projector"),
    *("--max_steps", "6", "--learning_rate", "2e-3", "--lr_scheduler_type", "constant", "--warmup_steps", "0"),
    *("--adam_epsilon", "1e-5", "--ddp_find_unused_parameters", "false"),
]


def test_nothing_runs_on_one_process():
    assert not must_run([torch.nn.Linear(2, 2)], training=True)


@pytest.mark.parametrize(
    ("trained", "training", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_trained_modules_run_on_several_ranks(monkeypatch, trained, training, expected):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert must_run([torch.nn.Linear(2, 2).requires_grad_(trained)], training) is expected


def test_idle_towers_change_nothing_and_get_zero_gradients(captioner, avworld_processor, rows, monkeypatch):
    collator = SupervisedCollator(avworld_processor, "What can you see ?", ("image",), frame=0)
    batch = {name: value for name, value in collator(rows).items() if name != "id"}
    captioner.train()
    expected = captioner(**batch).loss
    assert all(weight.grad is None for weight in captioner.model.audio_tower.parameters())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    loss = captioner(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
    gradients = [
        weight.grad
        for part in ("audio_tower", "audio_projector")
        for weight in getattr(captioner.model, part).parameters()
    ]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.fixture(scope="module")
def alone(run_stage, run_dir, tmp_path_factory):
    """Folder of the run of one process, and for each step the modalities of its two clips."""
    folder, steps = tmp_path_factory.mktemp("alone"), []

    def recorded(self, rows):
        batch = call(self, rows)
        tokens = run_stage_tokens(self)
        steps.append([bool((row == tokens).any()) for row in batch["input_ids"]])
        return batch

    def run_stage_tokens(collator):
        return collator.processor.tokenizer.convert_tokens_to_ids("<audio>")

    call = SupervisedCollator.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedCollator, "__call__", recorded)
        run_stage("supervised", run_dir / "aligned", folder, *WORDS, "--per_device_train_batch_size", "2")
    return folder, steps


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_with_other_modalities_train_the_weights_of_one(
    alone, run_dir, stage_words, datasets_cache, tmp_path, engine
):
    folder, steps = alone
    assert {tuple(step) for step in steps} >= {(True, False)} or {tuple(step) for step in steps} >= {(False, True)}
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    words = stage_words(
        "supervised", run_dir / "aligned", tmp_path / "out", *WORDS, "--per_device_train_batch_size", "1"
    )
    (tmp_path / "stages.json").write_text(json.dumps({"sft": ["dali_llava.train.sft", words]}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", DRIVER, engine]
    environment = os.environ | {"HF_DATASETS_CACHE": str(datasets_cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, tmp_path / "stages.json"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (ran,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert ENGINES[engine] in ran["engine"] and ran["processes"] == 2
    assert (ran["sharded"] > 0) == (engine in ("zero3", "fsdp2"))
    ours, expected = load_stage_weights(tmp_path / "out"), load_stage_weights(folder)
    assert ours.keys() == expected.keys()
    assert max((ours[name] - expected[name]).abs().max().item() for name in expected) <= 1e-5
    start = load_file(run_dir / "aligned" / "stage.safetensors")
    moved = [(expected[name] - start[name]).abs().max().item() for name in start if not name.endswith("k_proj.bias")]
    assert min(moved) > 1e-3
