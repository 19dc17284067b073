"""Fixtures for the tests of the stages: two steps of each stage of DALI on a very small AVWorld."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from dali_llava.modeling import LlavaAudioForConditionalGeneration, LlavaAudioTowers
from dali_llava.processing import SOUND_PROMPT, LlavaAudioProcessor
from dali_llava.processing.corpora.avworld.avworld import make_row
from dali_llava.train import align, distill, lavcap, prefix_tune, sft
from dali_llava.train.avworld import pretrain_captioner, pretrain_tower
from dali_llava.train.avworld.pretrain_captioner import tokenize_dialogues
from dali_llava.train.command_line import CONFIGS
from dali_llava.train.data.draws import Draws


AVWORLD = CONFIGS / "avworld"
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_CAPTIONER = [
    *("--vision_config", json.dumps({"model_type": "clip_vision_model", "image_size": 48, "patch_size": 8, **WIDTH})),
    *("--text_config", json.dumps({"model_type": "llama", "max_position_embeddings": 512, **WIDTH})),
    *("--audio_config", json.dumps({"output_size": 32, "num_mel_bins": 64, "max_length": 256, **WIDTH})),
    *("--vision_steps", "2", "--vision_batch_size", "4"),
]
SIZES = {"captioner": 16, "shots": 16, "train": 16, "balanced": 8}
QUICK = [
    *("--max_steps", "2", "--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--use_cpu", "true"),
    *("--report_to", "none"),
    *("--dataset_options", json.dumps({"sizes": SIZES})),
]
STAGES = {
    "captioner": (pretrain_captioner, AVWORLD / "captioner.yaml", TINY_CAPTIONER),
    "prefix": (prefix_tune, AVWORLD / "prefix_tune.yaml", []),
    "tower": (pretrain_tower, AVWORLD / "pretrain_tower.yaml", ["--examples", "8"]),
    "aligned": (align, AVWORLD / "align.yaml", []),
    "distilled": (distill, AVWORLD / "distill.yaml", ["--caption_max_new_tokens", "6"]),
    "lavcap": (lavcap, AVWORLD / "lavcap.yaml", ["--split", "shots"]),
    "supervised": (sft, AVWORLD / "sft.yaml", ["--split", "shots", "--modalities", "audio", "audiovisual"]),
}


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory) -> Path:
    """Temporary cache of generated corpora and computed columns."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="session")
def stage_words():
    """`stage_words(stage, base, output, *overrides)`: the command-line arguments of a stage for two steps."""

    def stage_words(stage: str, base: Path | None, output: Path, *overrides: str) -> list[str]:
        _, config, own = STAGES[stage]
        base_words = [] if base is None else ["--base_model", str(base)]
        return [str(config), *own, *QUICK, *base_words, "--output_dir", str(output), *overrides]

    return stage_words


@pytest.fixture(scope="session")
def run_stage(stage_words):
    """`run_stage(stage, base, output, *overrides)`: runs two steps of a stage and returns its trainer."""

    def run_stage(stage: str, base: Path | None, output: Path, *overrides: str):
        return STAGES[stage][0].main(stage_words(stage, base, output, *overrides))

    return run_stage


@pytest.fixture(scope="session")
def launch_stages(datasets_cache):
    """
    `launch_stages(engine, runs, folder)`: runs stages in two processes and returns what ran; see `engines_driver.py`.

    The engine is the name of a configuration in `train/configs/accelerate`. The runs are {name: (stage, words)}.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")

    def launch_stages(engine: str, runs: dict[str, tuple[str, list[str]]], folder: Path) -> dict[str, dict]:
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed", reason="ZeRO needs the extra deepspeed")
        listing = folder / "stages.json"
        listing.write_text(
            json.dumps({name: (STAGES[stage][0].__name__, words) for name, (stage, words) in runs.items()})
        )
        launch = ["--config_file", CONFIGS / "accelerate" / f"{engine}.yaml", "--main_process_port", "0"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--num_processes", "2"]
        environment = os.environ | {"HF_DATASETS_CACHE": str(datasets_cache), "OMP_NUM_THREADS": "1"}
        driver = Path(__file__).with_name("engines_driver.py")
        done = subprocess.run([*command, driver, listing], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
        return {line.pop("name"): line for line in lines}

    return launch_stages


@pytest.fixture(scope="session")
def run_dir(run_stage, tmp_path_factory) -> Path:
    """Folder of a run with the checkpoints of DALI's stages, each trained from the previous one. Read-only."""
    folder = tmp_path_factory.mktemp("run")
    base = None
    for stage in [name for name in STAGES if name not in ("lavcap", "supervised")]:
        run_stage(stage, base, folder / stage)
        base = folder / stage
    return folder


@pytest.fixture(scope="session")
def avworld_processor(run_dir) -> LlavaAudioProcessor:
    """Processor of the run's checkpoints."""
    return LlavaAudioProcessor.from_pretrained(run_dir / "captioner")


@pytest.fixture
def captioner(run_dir) -> LlavaAudioForConditionalGeneration:
    """Captioner of the run, loaded for each test, so that the test can modify it."""
    return LlavaAudioForConditionalGeneration.from_pretrained(run_dir / "captioner")


@pytest.fixture
def towers(run_dir) -> LlavaAudioTowers:
    """The two towers of the run's captioner, loaded for each test, so that the test can modify them."""
    return LlavaAudioTowers.from_pretrained(run_dir / "captioner")


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Four rows of AVWorld with audio, frames, captions, a question and an answer."""
    rows = [make_row("shots", index) for index in range(4)]
    return [row | {"question": SOUND_PROMPT, "answer": row["captions"][index]} for index, row in enumerate(rows)]


@pytest.fixture(scope="session")
def generators():
    """`generators(count, seed=0)`: random generators of a batch of `count` rows."""
    return lambda count, seed=0: Draws(seed)([{"id": str(index)} for index in range(count)])


@pytest.fixture
def view_rows(rows, avworld_processor):
    """`view_rows(seen)`: the tokenized dialogues of the rows, with an image for each row whose `seen` is True."""

    def view_rows(seen: list[bool]) -> list[dict]:
        corpus = [
            {
                "id": row["id"],
                "frames": row["frames"][:1] if see else [],
                "dialogues": [{"question": row["question"], "answer": row["answer"]}],
            }
            for row, see in zip(rows, seen, strict=True)
        ]
        return list(tokenize_dialogues(Dataset.from_list(corpus), avworld_processor))

    return view_rows
