"""Pretraining of the audio tower: what it trains, what it starts from, and that it learns."""

import pytest
import torch

from dali_llava.train.avworld.sound_statistics import StatisticsLoss, spectral_statistics
from dali_llava.train.avworld.tower import SoundCollator, TowerModel
from dali_llava.train.data.augmentation import UNCHANGED


def test_the_gradient_is_the_towers_and_the_workers(towers, avworld_processor, rows):
    batch = SoundCollator(avworld_processor, UNCHANGED)(rows)
    model = TowerModel(towers, StatisticsLoss(32, batch["input_features"]))
    loss = model(batch["input_features"])["loss"]
    tokens = towers.audio_tower(batch["input_features"]).last_hidden_state
    torch.testing.assert_close(loss, model.objective(tokens, batch["input_features"]))
    loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    tower = {name for name, _ in model.named_parameters() if name.startswith("towers.audio_tower.")}
    assert moved == tower | {"objective.worker.weight", "objective.worker.bias"}


def test_statistics_are_standardised_by_the_corpus(run_stage, run_dir, tmp_path):
    plain = ["--augmentation_noise", "0", "--augmentation_roll", "0", "--augmentation_equaliser", "0"]
    trainer = run_stage("tower", run_dir / "prefix", tmp_path, *plain, "--augmentation_mix", "0", "--examples", "5")
    features = torch.stack([torch.as_tensor(row["input_features"]) for row in trainer.train_dataset])[:5]
    expected = spectral_statistics(features)
    torch.testing.assert_close(trainer.model.objective.mean, expected.mean(0))
    torch.testing.assert_close(trainer.model.objective.deviation, expected.std(0).clamp_min(1e-6))


def test_tower_learns_to_tell_statistics(run_stage, run_dir, tmp_path):
    """Forty steps on the same four clips. Predicting their mean has a loss of 1.0."""
    still = ["--augmentation_noise", "0", "--augmentation_roll", "0", "--augmentation_equaliser", "0"]
    words = ["--max_steps", "40", "--max_samples", "4", "--augmentation_mix", "0", "--examples", "4"]
    rate = ["--learning_rate", "3e-3", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
    trainer = run_stage("tower", run_dir / "prefix", tmp_path, *still, *words, *rate, "--logging_steps", "1")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0.7 and losses[-1] < 0.2


def test_sounds_need_no_pictures(run_stage, run_dir, tmp_path):
    """The loader opens the audio but no frames, and replaces broken clips as in other stages."""
    trainer = run_stage("tower", run_dir / "prefix", tmp_path, "--cache_features", "false")
    assert trainer.state.global_step == 2 and trainer.broken_clips == 0
    assert "image_tokens" not in trainer.train_dataset.column_names


def test_one_example_has_no_deviation(run_stage, run_dir, tmp_path):
    with pytest.raises(ValueError, match="examples: 1 rows have no standard deviation; give at least 2"):
        run_stage("tower", run_dir / "prefix", tmp_path, "--examples", "1")
