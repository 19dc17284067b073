"""The trainer of the supervised fine-tuning: TRL's loss and metrics, what it inherits, and the missing extra."""

import importlib
import sys

import pytest
import torch
from datasets import Dataset

from dali_llava.processing import SOUND_PROMPT
from dali_llava.train.base_model import train_only
from dali_llava.train.data.collators import SupervisedCollator
from dali_llava.train.trainers.stage import NonFiniteLossError


pytest.importorskip("trl", reason="trl is not installed")


@pytest.fixture
def trainer(captioner, avworld_processor, rows, tmp_path):
    from dali_llava.train.trainers.supervised import SupervisedArguments, SupervisedTrainer

    train_only(captioner, captioner.model.audio_projector)
    return SupervisedTrainer(
        model=captioner,
        args=SupervisedArguments(
            output_dir=str(tmp_path),
            base_model="base",
            use_cpu=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=SupervisedCollator(avworld_processor, SOUND_PROMPT, ("audio", "audiovisual")),
        processing_class=avworld_processor,
        stage="sft",
    )


def test_loss_is_the_models_own(trainer, captioner, rows):
    """Also with the number of answer tokens of two accumulated batches."""
    batch = trainer.data_collator(rows)
    batch.pop("id")
    captioner.eval()
    expected = captioner(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(captioner, dict(batch)), expected)
    count = 2 * (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(captioner, dict(batch), num_items_in_batch=count)
    torch.testing.assert_close(loss, expected / 2)


def test_gradients_are_the_models_own(trainer, captioner, rows):
    batch = trainer.data_collator(rows)
    batch.pop("id")
    weight = captioner.model.audio_projector.linear_1.weight
    (expected,) = torch.autograd.grad(captioner(**batch).loss, weight)
    (gradient,) = torch.autograd.grad(trainer.compute_loss(captioner, dict(batch)), weight)
    torch.testing.assert_close(gradient, expected)
    assert expected.any()


def test_log_has_the_accuracy_and_the_throughput(trainer, captioner, rows):
    trainer.train()
    entry = trainer.state.log_history[0]
    assert {"loss", "grad_norm", "mean_token_accuracy", "entropy", "clips_per_second", "memory_gb"} <= set(entry)
    batch = trainer.data_collator(rows)
    labels = batch["labels"][:, 1:]
    assert entry["num_tokens"] == batch["attention_mask"].sum()
    trainer._metrics["eval"].clear()
    captioner.eval()
    batch.pop("id")
    trainer.compute_loss(captioner, dict(batch))
    with torch.no_grad():
        best = captioner(**batch).logits[:, :-1].argmax(-1)
    expected = (best == labels)[labels != -100].float().mean().item()
    assert trainer._metrics["eval"]["mean_token_accuracy"] == [pytest.approx(expected)]


def test_loss_that_is_not_finite_names_the_clips(trainer, captioner, rows):
    with torch.no_grad():
        captioner.model.audio_projector.linear_2.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="step 1: the loss is nan; clips shots-00000"):
        trainer.train()


def test_nothing_is_sent_to_the_hub(trainer, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: pytest.fail("telemetry is sent"))
    trainer._send_telemetry()


def test_missing_trl_is_named_with_its_extra(monkeypatch):
    name = "dali_llava.train.trainers.supervised"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r'needs trl, .* run pip install "dali-llava\[trl\]"'):
        importlib.import_module(name)
