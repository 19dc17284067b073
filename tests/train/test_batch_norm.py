"""An audio tower with BatchNorm in the stages: its statistics are frozen, or they are trained, saved and restored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dali_llava.modeling import LlavaAudioForConditionalGeneration


WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
BATCH_NORM = "model.audio_tower.embeddings.init_bn."
STATISTICS = [BATCH_NORM + name for name in ("running_mean", "running_var", "num_batches_tracked")]


@pytest.fixture(scope="module")
def prefix_dir(run_stage, tmp_path_factory) -> Path:
    """`prefix_dir(freeze)`: a captioner with a CED tower whose prefix is trained."""
    folder = tmp_path_factory.mktemp("ced")

    def prefix_dir(freeze: bool) -> Path:
        run = folder / str(freeze)
        if not run.exists():
            tower = {"model_type": "ced_audio", "max_length": 256, "freeze_batch_norm": freeze, **WIDTH}
            tower |= {"output_size": 32}
            words = ["--audio_config", json.dumps(tower), "--audio_mean", "0", "--audio_std", "1"]
            run_stage("captioner", None, run / "captioner", *words)
            run_stage("prefix", run / "captioner", run / "prefix")
        return run / "prefix"

    return prefix_dir


def statistics(folder: Path) -> list[torch.Tensor]:
    weights = LlavaAudioForConditionalGeneration.from_pretrained(folder).state_dict()
    return [weights[name] for name in STATISTICS]


def test_frozen_statistics_are_saved_once_and_stay(run_stage, prefix_dir, tmp_path):
    base = prefix_dir(True)
    assert set(load_file(base.parent / "captioner" / "model.safetensors")) >= set(STATISTICS)
    run_stage("aligned", base, tmp_path / "aligned")
    stage = set(load_file(tmp_path / "aligned" / "stage.safetensors"))
    assert BATCH_NORM + "weight" in stage and not stage & set(STATISTICS)
    assert all(map(torch.equal, statistics(tmp_path / "aligned"), statistics(base)))


def test_trained_statistics_are_saved_and_resumed(run_stage, prefix_dir, tmp_path):
    base = prefix_dir(False)
    words = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "false"]
    trainer = run_stage("aligned", base, tmp_path / "aligned", *words)
    bn = trainer.pretrained.audio_tower.embeddings.init_bn
    mean, variance, _ = statistics(tmp_path / "aligned")
    assert torch.equal(mean, bn.running_mean) and torch.equal(variance, bn.running_var)
    assert (mean - statistics(base)[0]).abs().min() > 0.01

    run_stage("aligned", base, tmp_path / "resumed", *words[2:], "--max_steps", "2")
    assert not torch.equal(statistics(tmp_path / "resumed")[0], mean)
    checkpoint = str(tmp_path / "aligned" / "checkpoint-2")
    run_stage("aligned", base, tmp_path / "resumed", *words, "--resume_from_checkpoint", checkpoint)
    assert all(map(torch.equal, statistics(tmp_path / "resumed")[:2], [mean, variance]))
