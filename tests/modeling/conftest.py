"""Fixtures for the tests of the model: the loaded tiny checkpoint of tests/conftest.py, and a mixed batch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import SEE_PROMPT, SOUND_PROMPT


RATE = 16_000


@pytest.fixture(scope="session")
def model(tiny_model_dir) -> LlavaAudioForConditionalGeneration:
    """The tiny checkpoint in float32 and eval mode, with a prefix that affects captions. Do not modify it."""
    model = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir).eval()
    with torch.no_grad():
        model.model.prefix.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="session")
def mixed_samples(tiny_processor) -> list[dict]:
    """Inputs of the processor for audio, a picture, both, neither, and audio without prefix."""
    draw = np.random.default_rng(7)
    pictures = [Image.fromarray(draw.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(2)]
    time = np.arange(2 * RATE) / RATE
    sounds = [
        (np.sin(2 * np.pi * pitch * time) + 0.1 * draw.standard_normal(len(time))).astype(np.float32)[: int(s * RATE)]
        for pitch, s in ((300, 2.0), (1500, 1.2), (700, 0.6))
    ]
    prompt = tiny_processor.format_prompt
    return [
        {"text": prompt(SOUND_PROMPT, audio=True, prefix=True), "audio": sounds[0]},
        {"text": prompt(SEE_PROMPT, image=True), "images": pictures[0]},
        {"text": prompt(SOUND_PROMPT, image=True, audio=True, prefix=True), "images": pictures[1], "audio": sounds[1]},
        {"text": prompt("What is a dog ?")},
        {"text": prompt(SEE_PROMPT, audio=True), "audio": sounds[2]},
    ]


@pytest.fixture(scope="session")
def encode(tiny_processor):
    """A function that converts samples, as in `mixed_samples`, to a batch of model inputs."""

    def encode(samples: list[dict], **kwargs):
        return tiny_processor(
            text=[sample["text"] for sample in samples],
            images=[sample["images"] for sample in samples if "images" in sample] or None,
            audio=[sample["audio"] for sample in samples if "audio" in sample] or None,
            return_tensors="pt",
            **kwargs,
        )

    return encode


@pytest.fixture(scope="session")
def reference_towers():
    """The module `reference_towers.py` beside this file."""
    spec = importlib.util.spec_from_file_location("reference_towers", Path(__file__).with_name("reference_towers.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The process of a user who has the checkpoint and transformers, but not this package.
WITHOUT_PACKAGE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dali_llava":
            raise ImportError("dali_llava is not installed here")

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="session")
def run_without_package():
    """`run_without_package(script, home, *words)`: run a script without this package; returns its last line, JSON."""

    def run_without_package(script: str, home, *words) -> dict:
        caches = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_PACKAGE + script, *map(str, words)],
            env=os.environ | caches,
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run_without_package
