"""An external package adds an audio tower, an objective and a corpus with one file and one registration each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dali_llava.processing.corpora import load_corpus
from dali_llava.train import align
from dali_llava.train.command_line import CONFIGS
from dali_llava.train.losses import LOSSES, AlignmentLoss, MMDLoss, register_objective


TESTS = Path(__file__).parent.parent
FOLDERS = [TESTS / "extension", TESTS / "modeling"]  # the latter contains mel_mean_tower
OPTIONS = [
    *("--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--cache_features", "false", "--logging_steps", "1"),
]


@pytest.fixture
def outside(monkeypatch):
    """Adds the toy package to the import path and removes its registrations after the test."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    yield
    LOSSES.pop("offset", None)
    sys.modules.pop("offset_objective", None)


def words(run_dir, output, *others: str) -> list[str]:
    config = str(CONFIGS / "avworld" / "align.yaml")
    return [config, "--base_model", str(run_dir / "prefix"), "--output_dir", str(output), *OPTIONS, *others]


def test_objective_of_a_plugin_trains_its_parameter(run_dir, tmp_path, outside):
    options = ["--plugins", "offset_objective", "--objective", "offset", "--objective_options", '{"start": 0.25}']
    small = ["--dataset_options", '{"sizes": {"train": 16}}']
    trainer = align.main(words(run_dir, tmp_path / "out", *options, *small, "--logging_steps", "1"))
    offset = trainer.model.objective.offset
    assert offset.shape == (32,) and not torch.equal(offset, torch.full((32,), 0.25))
    tower, own = trainer.optimizer.param_groups[:2]
    assert own["params"][0] is offset and own["constant_rate"] and "constant_rate" not in tower
    logged = [entry["offset"] for entry in trainer.state.log_history if "offset" in entry]
    assert len(logged) == 2 and logged[0] == pytest.approx(0.25 * 32**0.5)
    assert trainer.stage == "align:offset" and (tmp_path / "out" / "stage.safetensors").is_file()


def test_corpus_of_a_plugin_is_aligned(run_dir, tmp_path, outside):
    options = ["--plugins", "tones_corpus", "--dataset", "tones", "--dataset_options", '{"size": 6}']
    trainer = align.main(words(run_dir, tmp_path / "out", *options))
    assert len(trainer.train_dataset) == 6 and trainer.state.global_step == 2
    with pytest.raises(ValueError, match="corpus 'tones' has no option 'sizes'; known: size"):
        load_corpus("tones", "train", sizes=3)


@pytest.fixture
def other_tower(run_dir, tmp_path, outside) -> Path:
    """The run's captioner with `mel_mean_tower` in place of CAV-MAE."""
    script = f"""
import sys
import torch
import mel_mean_tower
from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.processing import LlavaAudioFeatureExtractor, LlavaAudioProcessor

torch.manual_seed(0)
fields = LlavaAudioConfig.from_pretrained({str(run_dir / "captioner")!r}).to_dict()
config = LlavaAudioConfig(**fields | {{"audio_config": {{"model_type": "mel_mean_audio"}}}})
model = LlavaAudioForConditionalGeneration(config)
processor = LlavaAudioProcessor.from_pretrained({str(run_dir / "captioner")!r})
processor.feature_extractor = LlavaAudioFeatureExtractor(**config.audio_config.feature_extractor_kwargs)
for each in (model, processor):
    each.save_pretrained({str(tmp_path / "other")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(), capture_output=True, timeout=300)
    return tmp_path / "other"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS)), "OMP_NUM_THREADS": "1"}


def test_tower_of_a_plugin_is_aligned_from_the_shell(run_dir, other_tower, tmp_path, datasets_cache):
    """Runs the script with the objective and the corpus, as a user does."""
    config = tmp_path / "align.yaml"
    config.write_text("plugins: [mel_mean_tower, offset_objective, tones_corpus]\nobjective: offset\ndataset: tones\n")
    script = TESTS.parent / "train" / "align.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", script, config]
    command = [*launch, "--base_model", other_tower, "--output_dir", tmp_path / "out", *OPTIONS]
    cache = {"HF_DATASETS_CACHE": str(datasets_cache)}
    done = subprocess.run(command, env=environment() | cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "align:offset, 2 steps" in done.stdout
    trained = load_file(tmp_path / "out" / "stage.safetensors")
    before = load_file(other_tower / "model.safetensors")
    assert len(trained) == 6 and all(name.startswith("model.audio_tower.") for name in trained)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trained.items())


def test_missing_plugin_is_named(run_dir, tmp_path):
    with pytest.raises(ImportError, match="plugins: cannot import no_such_plugin .*; install its package or add"):
        align.main(words(run_dir, tmp_path / "out", "--plugins", "no_such_plugin"))


def test_names_that_are_taken_or_unfit_are_refused(outside):
    with pytest.raises(ValueError, match="objective mmd: MMDLoss has this name; choose another name"):
        register_objective("mmd", type("Other", (AlignmentLoss,), {}))
    register_objective("mmd", MMDLoss)  # again, because a module may be imported twice
    with pytest.raises(TypeError, match="objective linear: .*Linear.* is not a subclass of AlignmentLoss"):
        register_objective("linear", torch.nn.Linear)
