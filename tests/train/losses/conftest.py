"""Fixture for losses that use the samples of other ranks."""

import json
import os
import subprocess
import sys

import pytest
import torch


BEGIN = """
import datetime, json, sys
import torch
import torch.distributed as dist

given, store, rank = json.load(open(sys.argv[1])), sys.argv[2], int(sys.argv[3])
timeout = datetime.timedelta(seconds=60)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timeout)
"""
END = """
dist.destroy_process_group()
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory):
    """`on_two_ranks(code, given)`: runs code that computes `results` from `given` and `rank`; returns all results.

    Both `given` and `results` are JSON values. The code can use `torch` and a gloo process group.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")

    def on_two_ranks(code: str, given) -> list:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "given.json").write_text(json.dumps(given))
        (folder / "rank.py").write_text(BEGIN + code + END)
        command = [sys.executable, folder / "rank.py", folder / "given.json", folder / "store"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=180)[0] for process in processes]
        return [json.loads(output.splitlines()[-1]) for output in outputs]

    return on_two_ranks
