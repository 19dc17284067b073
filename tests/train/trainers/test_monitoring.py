"""What a stage logs in each entry, and what its progress bar shows."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback

from dali_llava.train.trainers import monitoring
from dali_llava.train.trainers.monitoring import StageProgress, StepMonitor, peak_memory


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def take_step(monitor, clock, seconds: float, batches: list[int], global_step: int = 1, max_steps: int = 9):
    """Run one step of a monitor that takes `seconds` for batches of these sizes; returns the control."""
    control = TrainerControl()
    monitor.start_step()
    monitor.count([{"id": ["a"] * size, "pixel_values": torch.zeros(size, 3)} for size in batches])
    clock.now += seconds
    monitor.on_step_end(None, TrainerState(global_step=global_step, max_steps=max_steps), control)
    return control


def entries(trainer) -> list[dict]:
    """Returns the entries of the training loss."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_throughput_is_clips_over_the_time_of_the_steps():
    clock = Clock()
    monitor = StepMonitor(clock)
    take_step(monitor, clock, 2.0, [3])
    clock.now += 100.0  # an evaluation
    take_step(monitor, clock, 4.0, [3, 2])
    assert monitor.entry(Accelerator(cpu=True))["clips_per_second"] == pytest.approx(8 / 6)
    take_step(monitor, clock, 0.5, [2])
    assert monitor.entry(Accelerator(cpu=True))["clips_per_second"] == pytest.approx(4.0)


def test_parts_are_means_over_steps_and_their_batches():
    clock = Clock()
    monitor = StepMonitor(clock)
    for value in (1.0, 3.0):  # a step of two batches
        monitor.add({"cost": torch.tensor(value, requires_grad=True), "gap": 2 * value}, scale=0.5)
    take_step(monitor, clock, 1.0, [4, 4])
    monitor.add({"cost": 5.0, "gap": 10.0})
    take_step(monitor, clock, 1.0, [4])
    entry = monitor.entry(Accelerator(cpu=True))
    assert (entry["cost"], entry["gap"]) == (3.5, 7.0)
    assert "transport_share" not in entry
    take_step(monitor, clock, 1.0, [4])
    assert "cost" not in monitor.entry(Accelerator(cpu=True))  # of the window before


def test_transport_share_is_the_solvers_seconds_over_those_of_the_steps():
    clock = Clock()
    monitor = StepMonitor(clock)
    for _ in range(2):
        monitor.add({"transport_seconds": 0.25}, scale=0.5)
        monitor.add({"transport_seconds": 0.5}, scale=0.5)
        take_step(monitor, clock, 3.0, [4, 4])
    entry = monitor.entry(Accelerator(cpu=True))
    assert entry["transport_share"] == pytest.approx(1.5 / 6) and "transport_seconds" not in entry


def test_notes_are_in_the_next_entry_only():
    clock = Clock()
    monitor = StepMonitor(clock)
    monitor.note({"token_mmd": 0.5})
    take_step(monitor, clock, 1.0, [1])
    assert monitor.entry(Accelerator(cpu=True))["token_mmd"] == 0.5
    take_step(monitor, clock, 1.0, [1])
    assert "token_mmd" not in monitor.entry(Accelerator(cpu=True))


def test_last_step_is_logged():
    clock = Clock()
    monitor = StepMonitor(clock)
    assert not take_step(monitor, clock, 1.0, [1], global_step=8).should_log
    assert take_step(monitor, clock, 1.0, [1], global_step=9).should_log


def test_entry_covers_all_ranks(monkeypatch):
    """Rank 0: 4 clips in 1 s, cost 1, 0.5 s of transport. Rank 1: 2 clips in 3 s, cost 2, 1.5 s of transport."""
    sent = []

    def gather(own: torch.Tensor) -> torch.Tensor:
        sent.append(own)
        return torch.cat(sent)

    ranks = SimpleNamespace(device=torch.device("cpu"), gather=gather)
    for rank, (clips, seconds, transport) in enumerate([(4, 1.0, 0.5), (2, 3.0, 1.5)]):
        monkeypatch.setattr(monitoring, "peak_memory", lambda device, rank=rank: (2 - rank) * 10**9)
        clock = Clock()
        monitor = StepMonitor(clock)
        monitor.add({"cost": 1.0 + rank, "transport_seconds": transport})
        monitor.note({"token_mmd": 0.5})
        take_step(monitor, clock, seconds, [clips])
        entry = monitor.entry(ranks)
    speeds = {"clips_per_second": 6 / 2, "memory_gb": 2.0, "transport_share": 2 / 4}
    assert entry == pytest.approx({"cost": 1.5, "token_mmd": 0.5, **speeds})


def test_memory_of_the_process_is_at_least_what_it_holds():
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("the system has no /proc")
    block = torch.ones(2**26)  # 256 MiB
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    held = int(line.split()[1]) * 1024
    del block
    assert 2**28 < 0.99 * held <= peak_memory(torch.device("cpu")) < 100 * held  # the counters lag by a few pages


COMMON = {"loss", "grad_norm", "learning_rate", "epoch", "step", "clips_per_second", "memory_gb"}


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        ("mmd", {"mmd", "bandwidth"}),
        ("ot", {"transport_cost", "mean_distance", "max_gap"}),
        ("contrastive", {"contrastive", "accuracy"}),
    ],
)
def test_alignment_logs_one_entry_with_the_parts(run_stage, run_dir, tmp_path, objective, parts):
    """The first step has three batches and the second has one, and the parts still equal the loss."""
    words = ["--objective", objective, "--gradient_accumulation_steps", "3", "--distance_steps", "0"]
    trainer = run_stage("aligned", run_dir / "prefix", tmp_path / "out", *words, "--logging_steps", "1")
    assert [entry["step"] for entry in entries(trainer)] == [1, 2]
    assert len(trainer.state.log_history) == 3  # with the summary of the training
    for entry in entries(trainer):
        assert set(entry) - {"transport_share"} == COMMON | parts
        main = {"mmd": "mmd", "ot": "transport_cost", "contrastive": "contrastive"}[objective]
        assert entry[main] == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["clips_per_second"] > 0 and 0 < entry["memory_gb"] < 1000


def test_window_is_averaged_and_logged_at_the_last_step(run_stage, run_dir, tmp_path):
    each = run_stage("aligned", run_dir / "prefix", tmp_path / "each", "--logging_steps", "1")
    both = run_stage("aligned", run_dir / "prefix", tmp_path / "both", "--logging_steps", "10")
    (entry,) = entries(both)
    assert entry["step"] == 2
    for name in ("loss", "mmd", "bandwidth"):
        assert entry[name] == pytest.approx(sum(part[name] for part in entries(each)) / 2, rel=1e-5)


def test_captioner_logs_the_parts_of_its_loss(run_stage, tmp_path):
    trainer = run_stage("captioner", None, tmp_path / "out", "--logging_steps", "1", "--unlikelihood", "2.0")
    for entry in entries(trainer):
        assert set(entry) == COMMON | {"cross_entropy", "unlikelihood"}
        assert entry["cross_entropy"] + 2.0 * entry["unlikelihood"] == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["unlikelihood"] > 0


@pytest.mark.parametrize("stage", ["prefix", "tower", "distilled"])
def test_other_stages_log_their_loss(run_stage, run_dir, tmp_path, stage):
    base = {"prefix": "captioner", "tower": "prefix", "distilled": "aligned"}[stage]
    (entry,) = entries(run_stage(stage, run_dir / base, tmp_path / "out"))
    assert set(entry) == COMMON


def test_evaluation_does_not_count_as_training(run_stage, run_dir, tmp_path):
    words = ["--max_steps", "1", "--distance_steps", "0"]
    trainer = run_stage("aligned", run_dir / "prefix", tmp_path / "out", *words)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.model.eval()
    trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    trainer.monitor.start_step()
    trainer.monitor.count([batch])
    trainer.monitor.on_step_end(None, trainer.state, trainer.control)
    assert "mmd" not in trainer.monitor.entry(trainer.accelerator)


def test_progress_bar_shows_the_last_values():
    progress = StageProgress()
    state = TrainerState(max_steps=3, is_world_process_zero=True)
    shown = []
    progress.on_train_begin(None, state, None)
    progress.training_bar.close()
    progress.training_bar = SimpleNamespace(set_postfix=lambda values: shown.append(dict(values)))
    speeds = {"clips_per_second": 123.456, "memory_gb": 1.26, "transport_share": 0.4123}
    progress.on_log(None, state, None, logs={"loss": 0.123456, "grad_norm": 1.0, **speeds})
    progress.on_log(None, state, None, logs={"eval_loss": 2.0})
    progress.on_log(None, state, None, logs={"samples": "| id |"})
    first = {"loss": "0.1235", "clips/s": "123", "memory": "1.3GB", "transport": "41%"}
    assert shown == [first, first | {"eval_loss": "2"}, first | {"eval_loss": "2"}]


def test_stage_prints_no_entry(run_stage, run_dir, tmp_path, capsys):
    trainer = run_stage("prefix", run_dir / "captioner", tmp_path / "out")
    assert trainer.pop_callback(PrinterCallback) is None
    assert "loss" not in capsys.readouterr().out
