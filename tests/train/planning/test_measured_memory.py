"""Estimates of memory against the peak of a process that trains or captions at the size of SmolLM2-135M."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.train.planning import ENGINES, StageModel
from dali_llava.train.planning.engines import held_memory
from dali_llava.train.planning.steps import Batch, trace_captioning, trace_training_step


PROJECTOR = ("model.audio_projector",)
# name: inputs, trained parts, batch size, activation checkpointing
STEPS = {
    "prefix": (("image", "prefix"), ("model.prefix",), 2, False),
    "projector": (("audio",), PROJECTOR, 2, False),
    "checkpointing": (("image", "audio", "prefix"), PROJECTOR, 2, True),
    "language model": (("audio",), (*PROJECTOR, "model.language_model", "lm_head"), 2, False),
}


def measured_memory(**task) -> int:
    """Bytes that a process uses beside its libraries; see `memory_driver.py`."""
    driver = Path(__file__).with_name("memory_driver.py")
    # Freed blocks return to the system, so that the peak is that of the tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, driver, json.dumps(task, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["used"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory in the unit of Linux")
@pytest.mark.parametrize("name", STEPS)
def test_the_estimate_of_a_training_step_is_within_15_percent(smol_config, name):
    inputs, trained, size, checkpointing = STEPS[name]
    model = StageModel(LlavaAudioForConditionalGeneration, trained, (inputs,)).on_meta(smol_config, torch.float32)
    if checkpointing:
        model.activation_checkpointing_enable()
    held = sum(held_memory(model, ENGINES["ddp"], 1).values())
    used = trace_training_step(model, Batch(smol_config, inputs, size, 64))
    task = {"inputs": inputs, "trained": trained, "size": size, "checkpointing": checkpointing}
    measured = measured_memory(config=smol_config.to_dict(), text_tokens=64, new_tokens=0, **task)
    assert held + used.peak + used.gradients == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory in the unit of Linux")
def test_the_estimate_of_captioning_is_within_15_percent(smol_config):
    inputs, size, new_tokens = ("image", "audio", "prefix"), 4, 16
    used, weights = trace_captioning(smol_config, Batch(smol_config, inputs, size, 64), torch.float32, new_tokens)
    task = {"inputs": inputs, "size": size, "new_tokens": new_tokens}
    measured = measured_memory(config=smol_config.to_dict(), text_tokens=64, **task)
    assert weights + used.peak == pytest.approx(measured, rel=0.15)
