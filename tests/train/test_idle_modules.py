"""Towers without input on a rank: when they run, and that they change nothing."""

import pytest
import torch

from dali_llava.modeling.idle_modules import must_run
from dali_llava.train.data.collators import SupervisedCollator


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
