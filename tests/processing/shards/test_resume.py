"""Runs that are killed at any point and resumed write the same bytes as an uninterrupted run."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dali_llava.processing.shards import ClipSettings, prepare_shards


# A run in a separate process that can be killed.
RUN = """
import sys
import datasets
from dali_llava.processing.shards import ClipSettings, prepare_shards
if __name__ == "__main__":
    rows = datasets.load_from_disk(sys.argv[1])
    settings = ClipSettings(require=("audio",))
    prepare_shards(rows, sys.argv[2], settings, clips_per_shard=int(sys.argv[3]), num_proc=2)
"""


@pytest.fixture
def run_killed(tmp_path):
    """
    Start a run and kill it when the given number of new shard files exists, at whatever point that is.

    Temporary files do not count, since how many of them are seen depends on the machine.
    """
    script = tmp_path / "run.py"
    script.write_text(RUN)

    def run(rows: Path, out: Path, clips_per_shard: int, appearances: int) -> bool:
        """Whether the run was killed before it finished."""
        command = [sys.executable, str(script), str(rows), str(out), str(clips_per_shard)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        before = len(list(out.glob("shard-*")))
        while process.poll() is None and len(list(out.glob("shard-*"))) < before + appearances:
            time.sleep(0.0005)
        was_killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
        workers_pipe = process.communicate()[1]  # returns when the workers, which also hold stderr, have ended
        assert was_killed or process.returncode == 0, workers_pipe
        return was_killed

    return run


def made_corpus(made, folder: Path, count: int):
    """Clips of noise of 1 to 2 s; every 13th is silent, every 17th missing."""
    rows, generator = [], np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number}.wav"
        samples = generator.uniform(-0.5, 0.5, generator.integers(16_000, 32_000)) * (number % 13 != 5)
        if number % 17 != 7:
            soundfile.write(path, samples, 16_000)
        rows.append(made["make_row"](f"clip.{number}", path))
    corpus = made["as_corpus"](rows)
    corpus.save_to_disk(folder / "rows")
    return corpus


def test_a_killed_run_is_ended_by_the_next(made, run_killed, tmp_path):
    rows = made_corpus(made, tmp_path, 60)
    settings = ClipSettings(require=("audio",))
    whole = prepare_shards(rows, tmp_path / "whole", settings, clips_per_shard=4, num_proc=2)
    out = tmp_path / "out"
    assert run_killed(tmp_path / "rows", out, 4, appearances=8)
    assert not (out / "index.json").exists() and 0 < len(list(out.glob("shard-*.json"))) < 15
    assert prepare_shards(rows, out, settings, num_proc=2) == whole
    assert made["contents"](out) == made["contents"](tmp_path / "whole")


@pytest.mark.slow
def test_ten_kills_change_nothing(made, run_killed, tmp_path):
    rows = made_corpus(made, tmp_path, 200)
    settings = ClipSettings(require=("audio",))
    whole = prepare_shards(rows, tmp_path / "whole", settings, clips_per_shard=3, num_proc=2)
    out, draws = tmp_path / "out", random.Random(0)
    finished = []
    for _ in range(10):
        # each shard writes two files, so ten runs cannot finish all 67 shards
        assert run_killed(tmp_path / "rows", out, 3, appearances=draws.randint(1, 10))
        finished.append({path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")})
    for before, after in zip(finished, finished[1:], strict=False):
        assert before.items() <= after.items()  # a finished shard is not written again
    assert 0 < len(finished[-1]) < whole.num_shards
    assert prepare_shards(rows, out, settings, num_proc=2) == whole
    assert made["contents"](out) == made["contents"](tmp_path / "whole")  # and no temporary files
    index = json.loads((out / "index.json").read_text())
    assert index["clips"] + sum(index["dropped"].values()) == 200
