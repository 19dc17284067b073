"""
Distillations in this process for `test_pseudo_captions.py`. Each process prints the error of each, or null.

    python -m torch.distributed.run --standalone --nproc_per_node 2 captions_driver.py runs.json

The file contains `{name: [failing rank or null, [arguments of the stage]]}`. Generation fails on the failing rank.
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from dali_llava.eval.runner import CaptionRunner
from dali_llava.train import distill


def broken(self, decoded):
    raise RuntimeError("out of memory")


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    for name, (failing, words) in json.loads(Path(sys.argv[1]).read_text()).items():
        method = broken if rank == failing else CaptionRunner._inputs
        error = None
        with patch.object(CaptionRunner, "_inputs", method):
            try:
                distill.main(words)
            except (ValueError, RuntimeError) as raised:
                error = f"{type(raised).__name__}: {raised}"
        # A single write, so that the lines of two ranks do not mix.
        os.write(1, (json.dumps({"name": name, "rank": rank, "error": error}) + "\n").encode())
    dist.destroy_process_group()
