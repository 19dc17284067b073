"""Configurations of `accelerate launch`, and what a stage checks about its processes before it loads a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.train import engines
from dali_llava.train.arguments import StageArguments
from dali_llava.train.avworld import pretrain_captioner
from dali_llava.train.command_line import CONFIGS, is_lost_connection


ACCELERATE = CONFIGS / "accelerate"
# configuration: type of engine, processes and ZeRO stage
CONFIGURATIONS = {
    "one_gpu": (DistributedType.NO, 1, None),
    "ddp_8gpu": (DistributedType.MULTI_GPU, 8, None),
    "zero2": (DistributedType.DEEPSPEED, 8, 2),
    "zero3": (DistributedType.DEEPSPEED, 8, 3),
    "zero3_offload": (DistributedType.DEEPSPEED, 8, 3),
    "fsdp2": (DistributedType.FSDP, 8, None),
}
KILL = """
import os, signal
from dali_llava.train.trainers.stage import StageMixin

training_step = StageMixin.training_step


def killed(self, *args, **kwargs):
    if self.state.global_step == 2 and self.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kwargs)


StageMixin.training_step = killed
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The environment without a launcher. What a test or the package sets is removed afterwards."""
    for name in [*os.environ]:
        if name.startswith(("ACCELERATE_", "FSDP_")) or name == "LOCAL_WORLD_SIZE":
            monkeypatch.delenv(name)
    yield monkeypatch
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)


def arguments(folder: Path, **options) -> StageArguments:
    return StageArguments(output_dir=str(folder), report_to="none", **options)


def test_every_configuration_is_listed():
    assert {path.stem for path in ACCELERATE.iterdir()} == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_accelerate_reads_the_configuration(name):
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    engine, processes, stage = CONFIGURATIONS[name]
    assert (config.distributed_type, config.num_processes) == (engine, processes)
    assert not config.use_cpu
    if stage is not None:
        path = config.deepspeed_config["deepspeed_config_file"]
        deepspeed = json.loads((CONFIGS.parents[1] / path).read_text())
        assert deepspeed["zero_optimization"]["stage"] == stage
        assert not {"bf16", "fp16", "optimizer", "scheduler"} & deepspeed.keys()
        assert ("offload_param" in deepspeed["zero_optimization"]) == (name == "zero3_offload")


def test_more_processes_than_accelerators(environment, tmp_path):
    environment.setattr(torch.accelerator, "device_count", lambda: 2)
    environment.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="8 processes on a machine with 2 accelerators.*--num_processes 2"):
        arguments(tmp_path)
    assert arguments(tmp_path, use_cpu=True).world_size == 1  # no process group


def test_fsdp_1_is_refused(environment, tmp_path):
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    environment.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version 1 is not supported: use 2"):
        arguments(tmp_path)


def test_fsdp_is_refused_on_the_cpu(environment, tmp_path):
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    environment.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="FSDP runs on accelerators only"):
        arguments(tmp_path, use_cpu=True)


def test_deepspeed_is_missing(environment, tmp_path):
    environment.setattr(engines, "find_spec", lambda name: None)
    environment.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ImportError, match=r'pip install "dali-llava\[deepspeed\]"'):
        arguments(tmp_path)


def test_deepspeed_configuration_is_missing(environment, tmp_path):
    environment.setattr(engines, "find_spec", lambda name: name)
    with pytest.raises(FileNotFoundError, match="missing.json: no such DeepSpeed configuration"):
        arguments(tmp_path, deepspeed="missing.json")


def test_deepspeed_configuration_is_found_from_any_folder(environment, tmp_path):
    """The paths in `train/configs/accelerate` are relative to the folder of `train`, not to the working directory."""
    pytest.importorskip("deepspeed", reason="ZeRO needs the extra deepspeed")
    environment.chdir(tmp_path)
    environment.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    environment.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "train/configs/deepspeed/zero2.json")
    with pytest.raises(ValueError, match="ZeRO-2 runs on accelerators only"):
        arguments(tmp_path, use_cpu=True)


def test_captioner_is_refused_on_several_processes(environment, run_stage, tmp_path):
    environment.setattr(pretrain_captioner, "requested_engine", lambda arguments: "DDP")
    with pytest.raises(ValueError, match="DDP: the captioner of AVWorld is small and trains in one process"):
        run_stage("captioner", None, tmp_path)


def test_layer_classes(run_dir, towers):
    own = {"CavMaeEmbeddings", "CavMaeLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"}
    assert engines.layer_classes(towers) == own
    assert engines.layer_classes(torch.nn.Sequential(towers)) == own
    captioner = LlavaAudioForConditionalGeneration.from_pretrained(run_dir / "captioner")
    assert engines.layer_classes(captioner) == own | {"LlamaDecoderLayer"}


def test_lost_connections():
    peer = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert is_lost_connection(peer)
    assert is_lost_connection(dist.DistBackendError("NCCL error"))
    assert not is_lost_connection(RuntimeError("Connection of a layer"))
    assert not is_lost_connection(RuntimeError("gloo: shapes differ"))


@pytest.mark.slow
def test_a_rank_that_is_killed(run_dir, stage_words, datasets_cache, tmp_path):
    """The other rank prints one line, and the checkpoint of the step before remains."""
    (tmp_path / "kill.py").write_text(KILL)
    script = CONFIGS.parent / "align.py"
    saving = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1", "--plugins", "kill"]
    words = stage_words("aligned", run_dir / "prefix", tmp_path / "out", *saving)
    launch = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, script, *words]
    environment = {"HF_DATASETS_CACHE": str(datasets_cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("align.py: error:")]
    assert lines == [
        "align.py: error: rank 0: another rank ended; read its output, then continue from the last checkpoint with "
        "--resume_from_checkpoint true"
    ]
    assert "gloo" not in done.stderr
    assert (tmp_path / "out" / "checkpoint-2" / "checkpoint.json").is_file()
