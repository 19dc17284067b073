"""Checkpoints: what can be resumed, what is reported, and that a failed save leaves the last one whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dali_llava.modeling.stage_checkpoint import write_stage
from dali_llava.train.trainers import CaptioningTrainer
from dali_llava.train.trainers.checkpoints import MANIFEST, find_damage, newest_checkpoint
from dali_llava.train.trainers.stage import NonFiniteLossError
from dali_llava.train.trainers.weights import gather_weights, set_weights


SAVING = ["--save_strategy", "steps", "--save_steps", "1"]


@pytest.fixture(scope="module")
def saved(run_stage, run_dir, tmp_path_factory) -> Path:
    """Folder of a prefix tuning with checkpoints after steps 1 and 2. Read-only."""
    folder = tmp_path_factory.mktemp("saved") / "prefix"
    run_stage("prefix", run_dir / "captioner", folder, *SAVING)
    return folder


@pytest.fixture
def resume(saved, run_stage, run_dir, tmp_path):
    """`resume(*words, wanted="true")`: resumes a copy of `saved`, in `tmp_path / "run"`."""
    shutil.copytree(saved, tmp_path / "run")

    def resume(*words: str, wanted: str = "true", stage: str = "prefix"):
        return run_stage(
            stage, run_dir / "captioner", tmp_path / "run", *SAVING, "--resume_from_checkpoint", wanted, *words
        )

    return resume


def test_checkpoint_is_a_stage_and_lists_its_files(saved):
    folder = saved / "checkpoint-2"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST} == files
    assert {"stage.json", "stage.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(files)
    assert "model.safetensors" not in files
    description = json.loads((folder / "stage.json").read_text())
    assert (folder / description["base_model_name_or_path"]).resolve().name == "captioner"
    last = load_file(saved / "stage.safetensors")
    assert all(torch.equal(tensor, last[name]) for name, tensor in load_file(folder / "stage.safetensors").items())


@pytest.mark.parametrize("file", ["stage.safetensors", "optimizer.pt"])
def test_damaged_newest_checkpoint_falls_back_with_a_warning(resume, tmp_path, caplog, file):
    damaged = tmp_path / "run" / "checkpoint-2" / file
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    caplog.clear()
    assert resume().state.global_step == 2
    assert f"checkpoint-2 is damaged ({file} has" in caplog.text and "the checkpoint before it is used" in caplog.text
    assert find_damage(tmp_path / "run" / "checkpoint-2") is None  # written again


def test_damaged_checkpoint_by_name_is_an_error(resume, tmp_path):
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / "rng_state.pth").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2: rng_state\.pth is missing; resume from an earlier"):
        resume(wanted=str(folder))
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2: no readable checkpoint\.json"):
        resume(wanted=str(folder))


def test_missing_checkpoint_is_an_error(resume, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint-9: no such folder; give OUTPUT_DIR/checkpoint-N"):
        resume(wanted=str(tmp_path / "run" / "checkpoint-9"))


def test_newest_checkpoint_of_an_empty_folder_is_the_beginning(run_stage, run_dir, tmp_path, saved, caplog):
    run_stage("prefix", run_dir / "captioner", tmp_path / "new", "--resume_from_checkpoint", "true")
    assert "no complete checkpoint; training starts from the beginning" in caplog.text
    assert (tmp_path / "new" / "stage.safetensors").read_bytes() == (saved / "stage.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "1e-2"], "learning_rate 0.005 -> 0.01"),
        (["--prompt", "What is heard?"], "prompt 'What sound can be heard in this scene ?' -> 'What is heard?'"),
        (["--max_steps", "3", "--seed", "1"], "max_steps 2 -> 3; seed 0 -> 1"),
    ],
)
def test_changed_run_is_named_before_a_model_is_loaded(resume, monkeypatch, words, message):
    monkeypatch.setattr("dali_llava.train.prefix_tune.load_base", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError) as error:
        resume(*words)
    assert f"the run has changed ({message}); restore these values, or start a new run" in str(error.value)


def test_more_logging_is_not_a_change(resume):
    assert resume("--logging_steps", "1", "--save_total_limit", "3").state.global_step == 2


def test_checkpoint_of_another_stage_is_an_error(resume):
    with pytest.raises(ValueError, match=r"a checkpoint of the stage prefix, not of tower; resume the same stage"):
        resume(stage="tower")


@pytest.mark.parametrize("failing", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_full_disk_leaves_the_last_checkpoint_whole(run_stage, run_dir, saved, tmp_path, monkeypatch, failing):
    saves, original = [], getattr(CaptioningTrainer, failing)

    def full(self, output_dir):
        saves.append(output_dir)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        return original(self, output_dir)

    monkeypatch.setattr(CaptioningTrainer, failing, full)
    with pytest.raises(OSError, match="No space left on device"):
        run_stage("prefix", run_dir / "captioner", tmp_path / "run", *SAVING)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    run_stage("prefix", run_dir / "captioner", tmp_path / "run", *SAVING, "--resume_from_checkpoint", "true")
    assert not list((tmp_path / "run").glob(".checkpoint-*"))
    assert (tmp_path / "run" / "stage.safetensors").read_bytes() == (saved / "stage.safetensors").read_bytes()


def test_save_total_limit_keeps_the_newest_and_the_best(run_stage, run_dir, tmp_path):
    trainer = run_stage("prefix", run_dir / "captioner", tmp_path / "run", *SAVING, "--save_total_limit", "1")
    assert trainer.state.global_step == 2
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_before_the_update(run_stage, run_dir, tmp_path, monkeypatch, value):
    compute_loss = CaptioningTrainer.compute_loss

    def broken(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        return loss * value if self.state.global_step == 1 else loss

    monkeypatch.setattr(CaptioningTrainer, "compute_loss", broken)
    with pytest.raises(NonFiniteLossError, match=rf"^step 2: the loss is {value}; clips shots-.*are kept"):
        run_stage("prefix", run_dir / "captioner", tmp_path / "run", *SAVING)
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert torch.isfinite(
        load_file(tmp_path / "run" / "checkpoint-1" / "stage.safetensors")["model.prefix.weight"]
    ).all()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(0), "b is empty; pass the whole weights of a sharded model"),
        (torch.tensor([1.0, float("nan")]), "b contains NaN or infinity"),
        (torch.tensor([float("inf")]), "b contains NaN or infinity"),
    ],
)
def test_stage_with_a_bad_tensor_is_not_written(tmp_path, tensor, message):
    with pytest.raises(ValueError, match=message):
        write_stage(tmp_path / "out", {"a": torch.ones(2), "b": tensor}, base="base", stage="prefix")
    assert not (tmp_path / "out").exists()


def test_weights_are_gathered_and_set_by_name():
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert list(gather_weights(model)) == ["weight"] and gather_weights(model, keep=False) == {}
    weights = gather_weights(model, frozen=True)
    set_weights(other, weights)
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    with pytest.raises(ValueError, match=r"^bias has shape \(3,\) in the checkpoint, but the model has shape \(2,\)"):
        set_weights(other, {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)})
    assert torch.equal(other.weight, model.weight)  # nothing is set if a tensor does not match
    with pytest.raises(ValueError, match=r"the model has no such weight"):
        set_weights(other, {"gain": torch.zeros(3)})


@pytest.mark.parametrize("stage", ["prefix", "tower", "aligned", "distilled"])
def test_best_weights_are_loaded_at_the_end(run_stage, run_dir, tmp_path, stage):
    """A learning rate that is far too high makes the first evaluation the best one."""
    before = {"prefix": "captioner", "distilled": "aligned"}.get(stage, "prefix")
    words = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_split", "val", "--learning_rate", "10"]
    words += ["--warmup_steps", "0", "--lr_scheduler_type", "constant", "--max_steps", "3", "--save_total_limit", "1"]
    output = tmp_path / stage
    trainer = run_stage(stage, run_dir / before, output, *SAVING, *words, "--load_best_model_at_end", "true")
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert set(losses) == {1, 2, 3} and trainer.state.best_metric == losses[best]
    assert Path(trainer.state.best_model_checkpoint) == output / f"checkpoint-{best}"
    saved, kept = (load_file(folder / "stage.safetensors") for folder in (output, output / f"checkpoint-{best}"))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_evaluation_without_a_split_is_an_error(run_stage, run_dir, tmp_path):
    with pytest.raises(ValueError, match="eval_strategy steps: no split to evaluate on; give --eval_split NAME"):
        run_stage("prefix", run_dir / "captioner", tmp_path / "out", "--eval_strategy", "steps")
    with pytest.raises(ValueError, match="avworld, split train: rows without captions"):
        words = ["--eval_strategy", "steps", "--eval_split", "train"]
        run_stage("prefix", run_dir / "captioner", tmp_path / "out", *words)
