"""Plans of stages: counts of parameters, memory and operations against counted and known ones, and wrong inputs."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.train import align, distill, prefix_tune, sft
from dali_llava.train.adapters import add_adapter
from dali_llava.train.command_line import CONFIGS
from dali_llava.train.planning import ENGINES, StageModel, check_memory, device, plan_stage
from dali_llava.train.planning.arguments import planned_stage, stage_of
from dali_llava.train.planning.engines import held_memory
from dali_llava.train.planning.meter import measured
from dali_llava.train.planning.plan import count_parts
from dali_llava.train.planning.steps import Batch, step, trace_captioning, trace_training_step


AUDIO_STAGE = StageModel(LlavaAudioForConditionalGeneration, trained=("model.audio_projector",), samples=(("audio",),))


def arguments(stage, *words: str):
    config = CONFIGS / "full" / f"{stage.__name__.rpartition('.')[2]}.yaml"
    return stage.parse([str(config), "--use_cpu", "true", "--report_to", "none", *words])


def totals(parts) -> tuple[int, int]:
    return sum(part.parameters for part in parts.values()), sum(part.trained for part in parts.values())


def counted(model: nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


# Parameters


@pytest.mark.parametrize("size", ["tiny_config", "smol_config"])
def test_parameters_equal_those_of_a_real_model(size, request):
    config = request.getfixturevalue(size)
    model = AUDIO_STAGE.select(LlavaAudioForConditionalGeneration(config))
    assert totals(count_parts(AUDIO_STAGE.on_meta(config, torch.float32))) == counted(model)


def test_parameters_of_the_second_paper():
    """CED-base, Llama-2-7B and the linear projector with LoRA of rank 8 on queries and values, and a temperature."""
    config = CONFIGS / "full" / "lavcap.yaml"
    given, stage, config, frames, _ = planned_stage("lavcap", config, ["--bf16", "false"])
    assert frames == 20
    plan = plan_stage(given, stage, config, gpus=8, frames=frames)
    assert {name: part.trained for name, part in plan.parts.items() if part.trained} == {
        "audio_tower": 294_912,
        "language_model": 4_194_304,
        "audio_projector": 3_149_824,
        "objective": 1,
    }
    assert plan.parts["audio_tower"].parameters == 85_305_728 + 294_912
    assert (plan.sequence, plan.samples) == (64 + 20 + 128, 32)


def test_parameters_of_the_paper():
    """Vicuna-7B with 64 more tokens, CLIP ViT-L/14@336 without pooled output, CAV-MAE, and the two projectors."""
    parts = count_parts(AUDIO_STAGE.on_meta(LlavaAudioConfig(), torch.bfloat16))
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert parts["language_model"].parameters == 32064 * 4096 + 32 * layer + 4096
    assert parts["lm_head"].parameters == 32064 * 4096
    assert parts["audio_tower"].parameters == 86_434_816
    assert parts["audio_projector"].parameters == parts["audio_projector"].trained == projector
    assert parts["audio_projector"].bytes == 4 * projector and parts["multi_modal_projector"].bytes == 2 * projector
    assert totals(parts)[1] == projector


def test_adapters_equal_those_of_peft(tiny_config):
    pytest.importorskip("peft", reason="peft is not installed")
    words = ["--lora", "language_model", "audio_tower", "--lora_rank", "3"]
    stage = distill.stage_model(arguments(distill, *words), tiny_config)
    model = stage.select(stage.model_class(tiny_config))
    parts = count_parts(stage.on_meta(tiny_config, torch.bfloat16))
    assert totals(parts) == counted(model)
    # Per layer: four projections 32 x 32 and three of the MLP 32 x 64 in the language model.
    assert parts["language_model"].trained == 2 * 3 * (4 * (32 + 32) + 3 * (32 + 64))


@pytest.mark.parametrize(
    ("stage", "words", "trained"),
    [
        (prefix_tune, [], {"prefix"}),
        (align, ["--objective", "mmd"], {"audio_tower"}),
        (align, ["--objective", "ot_att"], {"audio_tower", "objective"}),
        (distill, [], {"audio_projector"}),
        (sft, ["--train_parts", "prefix", "language_model"], {"prefix", "language_model", "lm_head"}),
    ],
)
def test_stages_train_what_they_say(stage, words, trained, tiny_config):
    if stage is sft:
        pytest.importorskip("trl", reason="trl is not installed")
        config = CONFIGS / "avworld" / "sft.yaml"
        given = sft.parse([str(config), "--use_cpu", "true", "--report_to", "none", *words])
    else:
        given = arguments(stage, *words)
    parts = count_parts(stage.stage_model(given, tiny_config).on_meta(tiny_config, torch.float32))
    assert {name for name, part in parts.items() if part.trained} == trained
    assert all(part.trained in (0, part.parameters) for part in parts.values())


def test_cached_image_tokens_need_no_vision_tower(tiny_config):
    plans = []
    for cache in ("none", "disk"):
        given = arguments(align, "--cache_features", cache, "--per_device_train_batch_size", "4")
        plans.append(plan_stage(given, align.stage_model(given, tiny_config), tiny_config))
    assert "vision_tower" in plans[0].parts and "vision_tower" not in plans[1].parts
    assert plans[1].memory["activations"] < plans[0].memory["activations"]
    assert plans[1].flops < plans[0].flops


# Memory


def test_the_peak_and_the_operations_of_known_code():
    """x (2, 8) and two products (2, 8) with weights (8, 8): the backward pass has two products per weight but one."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False, device="meta"), nn.Linear(8, 8, bias=False, device="meta"))
    with measured([model]) as used:
        output = model(torch.zeros(2, 8))
        assert (used.peak, used.gradients) == (3 * 2 * 8 * 4, 0)
        output.sum().backward()
    assert used.flops == (2 + 3) * 2 * 2 * 8 * 8
    assert used.gradients > 0


def test_gradients_divide_among_devices(tiny_config):
    whole, part = (
        trace_training_step(
            StageModel(LlavaAudioForConditionalGeneration, ("model.language_model",), (("audio",),)).on_meta(
                tiny_config, torch.float32
            ),
            Batch(tiny_config, ("audio",), 1, 8),
            micro_batches=2,
            gradient_share=share,
        )
        for share in (1.0, 0.25)
    )
    assert part.gradients == pytest.approx(whole.gradients / 4, rel=0.01)
    assert part.peak == pytest.approx(whole.peak, rel=0.05)


def test_checkpointing_saves_memory_and_costs_operations(tiny_config):
    config = copy.deepcopy(tiny_config)
    config.text_config.num_hidden_layers = 12
    used = []
    for enable in (False, True):
        model = AUDIO_STAGE.on_meta(config, torch.float32)
        if enable:
            model.activation_checkpointing_enable()
        used.append(trace_training_step(model, Batch(config, ("audio",), 2, 64)))
    assert used[1].peak < 0.6 * used[0].peak
    assert 1.2 < used[1].flops / used[0].flops < 1.6


def test_only_eager_attention_stores_its_matrices(tiny_config):
    batch = Batch(tiny_config, ("audio",), 2, 400)
    eager, fused = (
        trace_training_step(AUDIO_STAGE.on_meta(tiny_config, torch.float32, name), batch) for name in ("eager", "sdpa")
    )
    matrices = 2 * tiny_config.text_config.num_hidden_layers * 4 * batch.sequence**2 * 4
    assert eager.peak - fused.peak > matrices


def test_engines_divide_what_they_divide(tiny_config):
    model = AUDIO_STAGE.on_meta(tiny_config, torch.bfloat16)
    trained = counted(model)[1]
    held = {name: held_memory(model, engine, 4) for name, engine in ENGINES.items()}
    whole = held["ddp"]["weights"]
    assert whole == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert held["zero2"]["weights"] == whole
    assert held["zero3"]["weights"] == held["fsdp2"]["weights"] == -(-whole // 4)
    assert held["zero3_offload"]["weights"] == held["zero3_offload"]["optimizer"] == 0
    assert held["ddp"]["optimizer"] == 8 * trained and held["fsdp2"]["optimizer"] == 2 * trained
    assert held["zero2"]["optimizer"] == held["zero3"]["optimizer"] == 3 * trained  # with a float32 copy
    assert held["ddp"]["communication"] == 4 * trained
    assert held_memory(model, ENGINES["ddp"], 1)["communication"] == 0


def test_the_cache_of_captioning(tiny_config):
    """Keys and values of 2 layers, 4 heads of width 8, for 3 samples of 20 + 64 tokens and 5 new ones, in bfloat16."""
    batch = Batch(tiny_config, ("audio",), 3, 20)
    assert batch.sequence == 84
    used, weights = trace_captioning(tiny_config, batch, torch.bfloat16, new_tokens=5)
    assert used.cache == 2 * 2 * 4 * 8 * 3 * (84 + 5) * 2
    assert used.peak > used.cache
    model = AUDIO_STAGE.on_meta(tiny_config, torch.bfloat16)
    assert weights > sum(part.bytes for part in count_parts(model).values()) / 2


# Operations and time


@pytest.mark.parametrize("fusion", ["concatenate", "ot_attention"])
def test_operations_equal_those_of_real_tensors(tiny_config, fusion):
    """Of the whole step with real weights, except for the fused attention, for which torch has no formula: eager."""
    config = LlavaAudioConfig.from_dict(tiny_config.to_dict() | {"fusion": fusion})
    batch = Batch(config, ("image", "audio", "prefix"), 2, 8, frames=2)
    stage = StageModel(LlavaAudioForConditionalGeneration, ("model.audio_projector",), ())
    model = stage.select(LlavaAudioForConditionalGeneration._from_config(config, attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter:
        step(model.train(), batch).backward()
    used = trace_training_step(stage.on_meta(config, torch.float32, "eager"), batch)
    assert used.flops == counter.get_total_flops()


def test_operations_follow_the_rule_of_thumb(smol_config):
    """Per weight and token, two forwards and two more backwards through frozen layers; the attention adds its own."""
    used = trace_training_step(AUDIO_STAGE.on_meta(smol_config, torch.float32), Batch(smol_config, ("audio",), 1, 64))
    parts = count_parts(AUDIO_STAGE.on_meta(smol_config, torch.float32))
    products = 576 * 49155 + 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert parts["language_model"].parameters == pytest.approx(products, rel=0.01)
    text = 4 * products * (512 + 64)
    tower = 2 * 512 * parts["audio_tower"].parameters + 6 * 512 * parts["audio_projector"].parameters
    attention = 3.5 * 30 * 4 * (512 + 64) ** 2 * 576 + 6 * 4 * 512**2 * 384  # backwards 2.5 times the forward pass
    assert used.flops == pytest.approx(text + tower + attention, rel=0.02)


def test_hours_are_operations_over_throughput(tiny_config):
    given = arguments(prefix_tune)
    stage = prefix_tune.stage_model(given, tiny_config)
    plan = plan_stage(given, stage, tiny_config, tflops=10.0)
    assert (plan.samples, plan.sequence, plan.steps) == (16, 36 + 16 + 128, 500)
    assert plan.hours["training"] == pytest.approx(500 * plan.flops / 10e12 / 3600)
    twice = plan_stage(given, stage, tiny_config, gpus=2, tflops=10.0)
    assert (twice.samples, twice.steps) == (16, 500)  # 8 per device of the 16 clips
    assert twice.hours["training"] == pytest.approx(plan.hours["training"] / 2, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "zero9"}, "engine: unknown engine 'zero9'; known: ddp, zero2, zero3, zero3_offload, fsdp2"),
        ({"gpus": 0}, "gpus: must be positive, not 0"),
        ({"clips": -5}, "clips: must be positive, not -5"),
        ({"tflops": 0.0}, "tflops: must be positive, not 0.0"),
        ({"text_tokens": 0}, "text_tokens: must be positive, not 0"),
    ],
)
def test_wrong_arguments_are_named(tiny_config, options, message):
    given = arguments(prefix_tune)
    with pytest.raises(ValueError, match=message):
        plan_stage(given, prefix_tune.stage_model(given, tiny_config), tiny_config, **options)


# The check before a stage


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads the physical memory of Linux")
def test_the_memory_of_a_cpu_is_what_is_available():
    available, name = device.available_memory(torch.device("cpu"))
    assert 2**24 < available < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") and name == "the CPU"


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_engine_of_a_deepspeed_configuration(name):
    config = HfDeepSpeedConfig(str(CONFIGS / "deepspeed" / f"{name}.json"))
    plugin = SimpleNamespace(hf_ds_config=config, zero_stage=None)
    assert device.engine_name(SimpleNamespace(deepspeed_plugin=plugin)) == name


@pytest.mark.parametrize(
    ("fsdp", "processes", "name"), [({"version": 2}, 2, "fsdp2"), (None, 2, "ddp"), (None, 1, "ddp")]
)
def test_the_engine_without_deepspeed(fsdp, processes, name):
    given = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin_args=fsdp, world_size=processes)
    assert device.engine_name(given) == name


def test_a_small_stage_is_not_checked(tiny_config):
    given = arguments(prefix_tune)
    assert check_memory(given, prefix_tune.stage_model(given, tiny_config), tiny_config) is None


def test_a_stage_that_does_not_fit_is_refused(tiny_config, tiny_model_dir, monkeypatch, caplog):
    monkeypatch.setattr(device, "SMALL", 0)
    monkeypatch.setattr(device, "available_memory", lambda _: (10**6, "the GPU"))
    given = arguments(prefix_tune, "--base_model", str(tiny_model_dir))
    stage = prefix_tune.stage_model(given, tiny_config)
    with pytest.raises(
        ValueError, match=r"about .* GB of memory are needed .*, the GPU has 0\.0 GB; lower .* --force"
    ):
        check_memory(given, stage, tiny_config)
    given.force = True
    assert check_memory(given, stage, tiny_config).peak > 10**6
    assert "the GPU has 0.0 GB" in caplog.text
    monkeypatch.setattr(device, "available_memory", lambda _: (10**12, "the GPU"))
    given.force = False
    assert check_memory(given, stage, tiny_config).peak > 10**6


def test_every_stage_checks_its_memory(run_dir, run_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "SMALL", 0)
    monkeypatch.setattr(device, "available_memory", lambda _: (10, "the GPU"))
    bases = {
        "prefix": "captioner",
        "aligned": "prefix",
        "distilled": "aligned",
        "supervised": "aligned",
        "lavcap": "aligned",
    }
    for name, base in bases.items():
        with pytest.raises(ValueError, match="the GPU has 0.0 GB"):
            run_stage(name, run_dir / base, tmp_path / name)
        assert not (tmp_path / name).exists()


# The stage and its base model


def test_the_stage_is_that_of_the_file_name(tmp_path):
    assert stage_of(tmp_path / "align_recordings.yaml") == "align"
    with pytest.raises(ValueError, match="mine.yaml: its name does not start with a stage; give --stage, one of pref"):
        stage_of(tmp_path / "mine.yaml")


def test_the_base_model_gives_its_configuration(tiny_model_dir):
    words = ["--base_model", str(tiny_model_dir)]
    _, stage, config, _, origin = planned_stage("prefix_tune", CONFIGS / "full" / "prefix_tune.yaml", words)
    assert config.text_config.hidden_size == 32 and str(tiny_model_dir) in origin
    assert stage.trained == ("model.prefix",)


def test_adding_an_adapter_returns_the_captioner(tiny_config):
    captioner = LlavaAudioForConditionalGeneration(tiny_config)
    assert add_adapter(captioner, None, seed=0) is captioner
