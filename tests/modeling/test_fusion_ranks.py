"""Two processes whose batches have other modalities get the gradients of one process, with every part trained."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration


FUSIONS = {"ot_attention": {}, "joint_encoder": {"num_attention_heads": 4}, "q_former": {"num_attention_heads": 4}}
PAIRS = [
    ({"audio"}, {"image"}),
    ({"image"}, {"audio", "image"}),
    (set(), {"audio", "image"}),
    ({"audio", "image"}, {"audio"}),
]


def captioner(config: dict, fusion: str, pooling: str) -> LlavaAudioForConditionalGeneration:
    torch.manual_seed(0)
    vision = {**config["vision_config"], "projection_dim": 32}
    options = {"fusion": fusion, "fusion_options": FUSIONS[fusion], "vision_pooling": pooling}
    model = LlavaAudioForConditionalGeneration(LlavaAudioConfig(**{**config, "vision_config": vision, **options}))
    if pooling == "patches":  # the last layer and the CLS token of CLIP are not used
        model.model.vision_tower.requires_grad_(False)
    return model.train()


def batch(modalities: set[str], pooling: str) -> dict[str, torch.Tensor]:
    """One sample with two images, one clip of 64 tokens, both or neither."""
    generator = torch.Generator().manual_seed(len(modalities))
    frames = 2 * (1 if pooling == "frame" else 36) if "image" in modalities else 0
    row = [1, 8, *[5] * (64 * ("audio" in modalities)), *[4] * frames, *[6] * 16, 9, 10, 11]
    inputs = {"input_ids": torch.tensor([row]), "labels": torch.tensor([[-100] * (len(row) - 3) + row[-3:]])}
    if "image" in modalities:
        inputs["pixel_values"] = torch.randn(2, 3, 48, 48, generator=generator)
    if "audio" in modalities:
        inputs["input_features"] = torch.randn(1, 256, 64, generator=generator)
    return inputs


def gradients(model, wrapped, inputs) -> dict[str, torch.Tensor]:
    wrapped(**inputs).loss.backward()
    own = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in own.items()}


def compare(rank: int, folder: str, config: dict, engine: str) -> None:
    """Run in each process."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    for fusion in FUSIONS:
        for pooling in ("patches", "frame"):
            for pair in PAIRS:
                model = captioner(config, fusion, pooling)
                if engine == "ddp":
                    wrapped = DistributedDataParallel(model)
                else:  # units as accelerate makes them
                    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
                    for part in reversed(list(model.modules())):
                        if type(part).__name__ in model._no_split_modules:
                            fully_shard(part, mesh=mesh)
                    wrapped = fully_shard(model, mesh=mesh)
                found = gradients(model, wrapped, batch(pair[rank], pooling))
                torch.save(found, f"{folder}/{fusion}-{pooling}-{PAIRS.index(pair)}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ranks_with_other_modalities_get_the_gradients_of_one_process(tiny_config, tmp_path, engine):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    config = tiny_config.to_dict()
    mp.spawn(compare, args=(str(tmp_path), config, engine), nprocs=2)
    for fusion in FUSIONS:
        for pooling in ("patches", "frame"):
            for number, pair in enumerate(PAIRS):
                expected: dict[str, torch.Tensor] = {}
                for modalities in pair:
                    model = captioner(config, fusion, pooling)
                    for name, gradient in gradients(model, model, batch(modalities, pooling)).items():
                        expected[name] = expected.get(name, 0) + gradient / 2
                trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
                for rank in range(2):
                    found = torch.load(tmp_path / f"{fusion}-{pooling}-{number}-{rank}.pt")
                    assert set(found) == trained
                    for name in trained:
                        value = expected.get(name, torch.zeros_like(found[name]))
                        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=f"{name} {pair}")
                assert expected["model.audio_projector.weight"].any() and expected["lm_head.weight"].any()
