"""Runs that are killed in random steps and resumed end with the weights of an unbroken run."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dali_llava.train.losses import LOSSES


DRIVER = Path(__file__).with_name("kill_driver.py")
MODULES = {
    "captioner": "dali_llava.train.avworld.pretrain_captioner",
    "prefix": "dali_llava.train.prefix_tune",
    "tower": "dali_llava.train.avworld.pretrain_tower",
    "aligned": "dali_llava.train.align",
    "distilled": "dali_llava.train.distill",
    "supervised": "dali_llava.train.sft",
}
BEFORE = {
    "prefix": "captioner",
    "tower": "prefix",
    "aligned": "prefix",
    "distilled": "aligned",
    "supervised": "aligned",
}
RUNS = {stage: (stage, []) for stage in MODULES if stage != "aligned"} | {
    objective: ("aligned", ["--objective", objective, "--schedule_epochs", "3"]) for objective in LOSSES
}
STEPS = 12
SAVING = ["--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]


def run_all(runs: list[dict], folder: Path, cache: Path) -> list[int]:
    """The exit statuses of `runs` in `kill_driver.py`, which also writes their output to `folder`."""
    listing = folder / "runs.json"
    listing.write_text(json.dumps(runs))
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, DRIVER, listing], env=environment, capture_output=True, text=True)
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    return [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All trained tensors in a folder, by file and name."""
    return {
        (file.name, name): tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def killed_and_resumed(run_dir, stage_words, cache, folder: Path, run: str, kills: list[tuple[int, str]]) -> None:
    """Assert that a run that is killed in each of `kills`, and resumed, ends with the weights of an unbroken one."""
    stage, own = RUNS[run]

    def entry(output: Path, **more) -> dict:
        words = stage_words(stage, run_dir / BEFORE[stage] if stage in BEFORE else None, output, *SAVING, *own)
        return {"module": MODULES[stage], "words": [*words, "--resume_from_checkpoint", "true"], **more}

    runs, expected = [entry(folder / "unbroken")], [0]
    for step, name in kills:
        output = folder / f"{name}-{step}"
        runs += [entry(output, step=step, signal=name), entry(output)]
        expected += [-9 if name == "SIGKILL" else 0, 0]
    assert run_all(runs, folder, cache) == expected, (folder / "output.txt").read_text()[-4000:]
    unbroken = weights(folder / "unbroken")
    assert unbroken
    for step, name in kills:
        found = weights(folder / f"{name}-{step}")
        assert found.keys() == unbroken.keys()
        assert [key for key in unbroken if not torch.equal(found[key], unbroken[key])] == [], (step, name)


def test_alignment_after_a_kill_and_a_termination(run_dir, stage_words, datasets_cache, tmp_path):
    """Step 1 is before the first checkpoint, step 7 in the middle of an epoch of four steps."""
    killed_and_resumed(
        run_dir, stage_words, datasets_cache, tmp_path, "ot_att", [(1, "SIGKILL"), (7, "SIGKILL"), (7, "SIGTERM")]
    )
    output = (tmp_path / "output.txt").read_text()
    assert "interrupted, resume with: accelerate launch dali_llava.train.align.py" in output
    assert sorted(path.name for path in (tmp_path / "SIGTERM-7").glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-12",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_every_stage_after_kills_in_random_steps(run_dir, stage_words, datasets_cache, tmp_path, run):
    steps = random.Random(run).sample(range(1, STEPS + 1), 5)
    kills = [(step, name) for step in steps for name in ("SIGKILL", "SIGTERM")]
    killed_and_resumed(run_dir, stage_words, datasets_cache, tmp_path, run, kills)
