"""Measure what an alignment step spends on transport, on the language model, and on clips that are not cached.

The models have random weights, and a step is complete: both towers, OT^Att in its third epoch, backward and Adam. All
variants of a question alternate in one run. On a CPU, the sizes are AVWorld's and a larger one with 512 audio and 576
image tokens; on a GPU, they are those of the 7B captioner under bf16 autocast, which takes 80 GB of memory. The run
takes a few minutes:

    python benchmarks/step.py
    python benchmarks/step.py --device cuda --parts transport --batch 128
    python benchmarks/step.py --parts transport --sizes avworld --repeats 1

Parts:
    transport   the share of a step in which the towers wait for the solver, with the whole batch at once and in
                micro-batches, beside a loop over the pairs as in the reference implementation: POT's emd2 on distances
                from torch
    memory      peak memory of a step with the towers alone and with the whole captioner, and the size of the language
                model of the 7B captioner (computed)
    cache       an epoch that opens its clips and encodes their pictures, and one on stored features (MMD)
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import yaml
from loading import full_size_processor
from measure import (
    RESULTS,
    compare,
    format_spread,
    load_average,
    parse_benchmark,
    peak_memory,
    positive_int,
    save,
    show,
    spread,
    time_in_turns,
    wait_for,
)
from torch import nn
from transformers import CLIPImageProcessor
from transport import Problem, loop_costs

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration, LlavaAudioTowers
from dali_llava.processing import LlavaAudioFeatureExtractor, LlavaAudioProcessor
from dali_llava.processing.corpora import load_corpus
from dali_llava.train.command_line import CONFIGS
from dali_llava.train.data.collators import AlignmentCollator
from dali_llava.train.data.feature_cache import FeatureChoice, with_features
from dali_llava.train.losses import AttentiveTransportLoss, LossOutput, MMDLoss
from dali_llava.train.trainers import AlignmentModel


EPOCH = 3  # the attention is trained from epoch 2 on
MICRO_BATCHES = 4
LOOP, WHOLE, PARTS_OF_BATCH = "loop over pairs", "whole batch", f"{MICRO_BATCHES} micro-batches"
TOWERS, CAPTIONER = "towers", "whole captioner"
CACHED, UNCACHED = "cached", "not cached"
BYTES_16_BIT = 2
DTYPES = {"cuda": torch.bfloat16}  # of the weights that are not trained


@dataclass
class Size:
    """A captioner of random weights.

    Attributes:
        sections: sections of its `LlavaAudioConfig`.
        batch: pairs per step.
        clips: clips per epoch in the part cache.
    """

    sections: dict[str, dict]
    batch: int
    clips: int

    @property
    def config(self) -> LlavaAudioConfig:
        config = LlavaAudioConfig(**self.sections)
        config.image_seq_length = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return config


def block(width: int, layers: int) -> dict[str, int]:
    """Sizes of a tower with heads of width 64."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }


def avworld_sections() -> dict[str, dict]:
    words = yaml.safe_load((CONFIGS / "avworld" / "captioner.yaml").read_text())
    return {name: words[name] for name in ("vision_config", "text_config", "audio_config")}


SIZES = {
    "avworld": Size(avworld_sections(), batch=32, clips=128),
    "medium": Size(
        {
            "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **block(256, 2)},
            "text_config": {"model_type": "llama", "vocab_size": 32064, **block(512, 8)},
            "audio_config": {"output_size": 256, **block(256, 1)},
        },
        batch=8,
        clips=16,
    ),
    "full": Size({}, batch=256, clips=256),
}
DEFAULT_SIZES = {"cpu": ["avworld", "medium"], "cuda": ["full"]}


class PairLoopLoss(AttentiveTransportLoss):
    """The same loss, with the transport of one pair after another by POT."""

    def compute(self, *tokens_and_masks) -> LossOutput:
        posed = self.pose(*tokens_and_masks)
        x, y = posed.problem.x, posed.problem.y
        weights = tuple(part.to(x.dtype) for part in (posed.problem.a, posed.problem.b))
        wait_for(x.device.type)
        start = time.perf_counter()
        costs = loop_costs(Problem(x, y, weights))
        seconds = time.perf_counter() - start
        loss, _ = self.combine(costs.mean(), {name: term.mean() for name, term in posed.terms.items()})
        return LossOutput(loss, {"transport_seconds": seconds})


class AlignmentStep:
    """A training step. Each call runs one and records how long the towers waited for the solver."""

    def __init__(self, model: AlignmentModel):
        self.model, self.device = model.train(), next(model.parameters()).device
        # The optimizer of AlignmentTrainer.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-4, betas=(0.95, 0.999), weight_decay=5e-7, fused=True)
        self.waited: list[float] = []

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.model(**batch)
        output.loss.backward()
        self.optimizer.step()
        self.waited.append(output.logs.get("transport_seconds", 0.0))


def random_batch(config: LlavaAudioConfig, pairs: int, device: str) -> dict[str, torch.Tensor]:
    side, audio = config.vision_config.image_size, config.audio_config
    return {
        "pixel_values": torch.randn(pairs, 3, side, side).to(device),
        "input_features": torch.randn(pairs, audio.max_length, audio.num_mel_bins).to(device),
    }


def towers_of(config: LlavaAudioConfig, device: str) -> nn.Module:
    """Both towers with random weights, in 16 bit on a GPU. `AlignmentModel` keeps what it trains in float32."""
    with torch.device(device):
        return LlavaAudioTowers._from_config(config, dtype=DTYPES.get(device, torch.float32))


def captioner_of(config: LlavaAudioConfig, device: str) -> nn.Module:
    """The whole captioner except for the head of its language model, likewise."""
    with torch.device(device):
        return LlavaAudioForConditionalGeneration._from_config(config, dtype=DTYPES.get(device, torch.float32)).model


def attentive_loss(config: LlavaAudioConfig, loss_class: type = AttentiveTransportLoss) -> AttentiveTransportLoss:
    loss = loss_class(config.audio_config.output_size, solver="auto")
    loss.set_epoch(EPOCH)
    return loss


def measure_transport(name: str, size: Size, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the steps in turn: the loop, the whole batch at once, micro-batches."""
    torch.manual_seed(0)
    config, device = size.config, arguments.device
    towers, inputs = towers_of(config, device), random_batch(config, batch, device)
    objectives = {LOOP: (attentive_loss(config, PairLoopLoss), 1)}
    objectives |= {WHOLE: (attentive_loss(config), 1), PARTS_OF_BATCH: (attentive_loss(config), MICRO_BATCHES)}
    steps = {
        variant: AlignmentStep(AlignmentModel(towers, objective, parts).to(device))
        for variant, (objective, parts) in objectives.items()
    }
    works = {variant: partial(step, inputs) for variant, step in steps.items()}
    seconds = time_in_turns(works, arguments.repeats, device, f"transport, {name}")
    figures = compare(seconds, LOOP)
    for variant, own in figures.items():
        waited = steps[variant].waited[-arguments.repeats :]
        own["transport_share"] = spread(wait / whole for wait, whole in zip(waited, seconds[variant], strict=True))
        own["pairs_a_second"] = batch / own["seconds"]["median"]
    audio = config.audio_config
    tokens = {"audio_tokens": audio.num_audio_tokens(audio.max_length), "image_tokens": config.image_seq_length}
    return {**tokens, "width": audio.output_size, "figures": figures}


def show_transport(case: dict) -> None:
    rows = [
        [
            *(variant, format_spread(own["seconds"]), format_spread(own["times_faster"])),
            *(f"{own['pairs_a_second']:.3g}", format_spread(own["transport_share"])),
        ]
        for variant, own in case["figures"].items()
    ]
    columns = ["transport", "seconds per step", "times faster", "pairs per second", "share of the step"]
    show(title(case), columns, rows, [])


def step_of(build: Callable[[LlavaAudioConfig, str], nn.Module], size: Size, device: str) -> None:
    """Builds a model and runs one step."""
    config = size.config
    model = AlignmentModel(build(config, device), attentive_loss(config)).to(device)
    AlignmentStep(model)(random_batch(config, size.batch, device))


def measure_memory(name: str, size: Size, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a step, and the parameters that the alignment does not load."""
    own, small = Size(size.sections, batch, 1), Size(SIZES["avworld"].sections, 1, 1)
    figures = {
        variant: {
            "peak_bytes": peak_memory(
                partial(step_of, build, device=arguments.device),
                partial(same, own),
                partial(same, small),
                arguments.device,
            )
        }
        for variant, build in ((TOWERS, towers_of), (CAPTIONER, captioner_of))
    }
    for where, config in ((name, size.config), ("full", LlavaAudioConfig())):
        for variant, build in ((TOWERS, towers_of), (CAPTIONER, captioner_of)):
            count = sum(each.numel() for each in build(config, "meta").parameters())
            figures[variant][f"parameters_{where}"] = count
    saved = figures[CAPTIONER]["parameters_full"] - figures[TOWERS]["parameters_full"]
    return {"figures": figures, "saved_bytes_full_16_bit": BYTES_16_BIT * saved}


def same(size: Size) -> Size:
    """The inputs of `peak_memory` come from a function."""
    return size


def show_memory(case: dict) -> None:
    rows = [[variant, f"{own['peak_bytes'] / 2**20:.0f}"] for variant, own in case["figures"].items()]
    show(title(case), ["loaded", "peak MiB"], rows, [])
    print(f"7B captioner: {case['saved_bytes_full_16_bit'] / 1e9:.1f} GB of 16-bit weights are not loaded (computed)")


def processor_of(config: LlavaAudioConfig) -> LlavaAudioProcessor:
    side = config.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    extractor = LlavaAudioFeatureExtractor(**config.audio_config.feature_extractor_kwargs)
    return LlavaAudioProcessor(images, full_size_processor().tokenizer, extractor)


def measure_cache(name: str, size: Size, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time epochs of AVWorld's clips with and without stored features, and the time to store them."""
    torch.manual_seed(0)
    config, processor = size.config, processor_of(size.config)
    towers = towers_of(config, arguments.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder)),
    ):
        rows = load_corpus("avworld", "train", sizes={"train": size.clips}, num_proc=1)
        start = time.perf_counter()
        # `cache_features all`: image tokens of all frames, and spectrograms
        choice = FeatureChoice(frames=None, sounds=True, dtype=torch.float32)
        stored = with_features(rows, towers, processor, choice)
        storing = time.perf_counter() - start
        step = AlignmentStep(AlignmentModel(towers, MMDLoss()).to(arguments.device))
        collator = AlignmentCollator(processor)

        def epoch(rows: datasets.Dataset) -> None:
            for first in range(0, len(rows), batch):
                made = collator([rows[index] for index in range(first, min(first + batch, len(rows)))])
                step({key: value.to(arguments.device) for key, value in made.items() if torch.is_tensor(value)})

        works = {UNCACHED: partial(epoch, rows), CACHED: partial(epoch, stored)}
        figures = compare(time_in_turns(works, arguments.repeats, arguments.device, f"cache, {name}"), UNCACHED)
        return {"clips": len(rows), "seconds_to_store": storing, "figures": figures}


def show_cache(case: dict) -> None:
    rows = [
        [variant, format_spread(own["seconds"]), format_spread(own["times_faster"])]
        for variant, own in case["figures"].items()
    ]
    show(title(case), ["features", "seconds per epoch", "times faster"], rows, [])
    print(f"{case['seconds_to_store']:.3g} s to store the features of {case['clips']} clips")


def title(case: dict) -> str:
    return f"{case['part']}, {case['size']}, B = {case['batch']}"


PARTS = {
    "transport": (measure_transport, show_transport),
    "memory": (measure_memory, show_memory),
    "cache": (measure_cache, show_cache),
}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(DEFAULT_SIZES), default="cpu", help="device (default: cpu)")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument(
        "--sizes", choices=SIZES, nargs="+", help="sizes (default: avworld and medium on a CPU, full on a GPU)"
    )
    batches = ", ".join(f"{size.batch} {name}" for name, size in SIZES.items())
    parser.add_argument("--batch", type=positive_int, help=f"pairs per step (default: {batches})")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--output", type=Path, default=RESULTS / "step.json", help="output file")
    arguments = parse_benchmark(parser, words)
    arguments.sizes = arguments.sizes or DEFAULT_SIZES[arguments.device]
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments, load_before = parse_arguments(words), load_average()
    settings = {name: getattr(arguments, name) for name in ("sizes", "batch", "repeats", "device")}
    cases = []
    for part in dict.fromkeys(arguments.parts):
        measure, show_case = PARTS[part]
        for name in dict.fromkeys(arguments.sizes):
            size = SIZES[name]
            batch = arguments.batch or size.batch
            try:
                figures = measure(name, size, batch, arguments)
            except torch.OutOfMemoryError as error:
                raise SystemExit(f"{part}, {name}: out of memory; lower --batch. {error}") from error
            cases.append({"part": part, "size": name, "batch": batch, **figures})
            show_case(cases[-1])
            # Save after each case, because a later one may fail.
            path = save(arguments.output, "step", settings, cases, [], load_before)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
