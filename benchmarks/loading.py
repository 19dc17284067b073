"""Measure the pairs per second that one data loading worker prepares for alignment, and its memory growth.

The benchmark runs on one core and one thread with the full-size input: 10 s of audio as 1024 x 128 filter banks and
one random frame of ten at 336 x 336 pixels, augmentation included. It compares videos (the baseline), shards with
random access and streamed shards. It then streams many pairs and records the resident memory after each batch.

The number of pairs per second that an H200 can consume is bounded by the matrix products of the alignment step: audio
tower forward and backward, vision tower forward. This bound and the number of workers that reach it are computed, not
measured. The benchmark takes about five minutes:

    python benchmarks/loading.py
    python benchmarks/loading.py --clips 4 --batch 4 --repeats 1 --streamed 40
"""

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
import torch
from measure import RESULTS, alternate, compare, format_spread, load_average, must, positive_int, save, show
from prepare import make_clips
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from dali_llava.modeling import CavMaeAudioConfig, LlavaAudioConfig
from dali_llava.processing import LlavaAudioFeatureExtractor, LlavaAudioProcessor
from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.shards import ClipSettings, prepare_shards
from dali_llava.train.data.collators import AlignmentCollator


TITLE = "Pairs per second and worker (min / median / max)"
COLUMNS = ["storage", "seconds per batch", "pairs per second", "times faster"]
BASELINE = "videos"
H200_FLOPS = 790e12  # FLOP/s of large matrix products in bf16
MEMORY_GROWTH = 200  # largest growth allowed, in MB
WARM_UP = 500  # pairs streamed before the first memory measurement


def full_size_processor() -> LlavaAudioProcessor:
    """Processor of the full-size model, with a vocabulary of placeholders only."""
    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "<audio>", "<prefix>"]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    names = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), words, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), extra_special_tokens=words[4:], **names)
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    return LlavaAudioProcessor(CLIPImageProcessor(**size), tokenizer, LlavaAudioFeatureExtractor())


def step_flops() -> float:
    """Floating-point operations per pair in an alignment step: matrix products only, without the objective."""
    audio, vision = CavMaeAudioConfig(), LlavaAudioConfig().vision_config
    rows, columns = audio.grid_size
    layers = audio.num_hidden_layers + audio.num_joint_layers
    tower = forward_flops(rows * columns, audio.hidden_size, audio.intermediate_size, layers)
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    # The last layer is not run: the image tokens are the output of the penultimate layer.
    shown = forward_flops(patches, vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers - 1)
    return 3 * tower + shown


def forward_flops(tokens: int, width: int, inner: int, layers: int) -> float:
    """Operations of a transformer's forward pass: four projections and two MLP matrices per token, and attention."""
    return layers * (2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width)


def batches(rows: datasets.Dataset | datasets.IterableDataset, size: int) -> Iterator[list[dict]]:
    """Yield batches of rows indefinitely, as a data loading worker does."""
    if isinstance(rows, datasets.Dataset):
        order = (int(index) for _ in itertools.count() for index in torch.randperm(len(rows)))
        served = (rows[index] for index in order)
    else:
        served = iter(rows.repeat(None))
    while True:
        yield list(itertools.islice(served, size))


def resident_mb() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_throughput(corpora: dict, collator: AlignmentCollator, batch: int, repeats: int) -> dict:
    """Seconds, ratios and pairs per second for each kind of storage."""

    def serve(source: Iterator[list[dict]]) -> None:
        collator(next(source))

    works = {name: partial(serve, batches(rows, batch)) for name, rows in corpora.items()}
    with tqdm(total=len(works) * (repeats + 1), desc="pairs", leave=False) as bar:
        figures = compare(alternate(works, repeats, tick=bar.update), BASELINE)
    for own in figures.values():
        own["pairs_a_second"] = {
            name: batch / own["seconds"][other]
            for name, other in (("min", "max"), ("median", "median"), ("max", "min"))
        }
    return figures


def measure_memory(rows: datasets.IterableDataset, collator: AlignmentCollator, batch: int, count: int) -> dict:
    """Resident memory in MB after the warm-up pairs of a stream, and its maximum from then on."""
    source, memory = batches(rows, batch), {}
    for done in tqdm(range(batch, count + batch, batch), desc="stream", unit="batch", leave=False):
        collator(next(source))
        memory[done] = resident_mb()
    warm = min(WARM_UP, max(memory))
    first = next(value for done, value in memory.items() if done >= warm)
    highest = max(value for done, value in memory.items() if done >= warm)
    return {"pairs": max(memory), "after_warm_up": first, "highest": highest, "last": memory[max(memory)]}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clips", type=positive_int, default=32, help="number of 10 s clips to generate (default: 32)"
    )
    parser.add_argument("--batch", type=positive_int, default=32, help="pairs per batch (default: 32)")
    parser.add_argument("--repeats", type=positive_int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--streamed", type=positive_int, default=5000, help="pairs to stream (default: 5000)")
    parser.add_argument("--output", type=Path, default=RESULTS / "loading.json", help="output file")
    return parser.parse_args(words)


def measure(folder: Path, arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Run all measurements on clips generated in `folder`; returns the figures and their requirements."""
    (folder / "media").mkdir()
    make_clips(folder / "media", arguments.clips)
    videos = load_corpus("folder", "train", data_dir=str(folder / "media"))
    settings = ClipSettings(keep_frozen=True, keep_silent=True)
    prepare_shards(videos, folder / "shards", settings, clips_per_shard=8, num_proc=1)
    options = {"data_dir": str(folder / "shards")}
    streamed = load_corpus("shards", "train", streaming=True, **options)
    corpora = {BASELINE: videos, "shards, any order": load_corpus("shards", "train", **options)}
    corpora["shards, streamed"] = streamed
    collator = AlignmentCollator(full_size_processor())
    figures = measure_throughput(corpora, collator, arguments.batch, arguments.repeats)
    memory = measure_memory(streamed, collator, arguments.batch, arguments.streamed)
    bound = H200_FLOPS / step_flops()
    workers = {name: bound / own["pairs_a_second"]["median"] for name, own in figures.items()}
    case = {"figures": figures, "memory_mb": memory, "h200_pairs_a_second_at_most": bound, "workers_for_that": workers}
    growth = memory["highest"] - memory["after_warm_up"]
    return case, [must(f"memory growth over {memory['pairs']} streamed pairs, MB", growth, at_most=MEMORY_GROWTH)]


def main(words: list[str] | None = None) -> None:
    arguments, load_before = parse_arguments(words), load_average()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        case, musts = measure(Path(folder), arguments)
    settings = {name: getattr(arguments, name) for name in ("clips", "batch", "repeats", "streamed")}
    path = save(arguments.output, "loading", settings, [case], musts, load_before)
    rows = [
        [name, *(format_spread(own[column]) for column in ("seconds", "pairs_a_second", "times_faster"))]
        for name, own in case["figures"].items()
    ]
    show(TITLE, COLUMNS, rows, musts)
    bound, workers = case["h200_pairs_a_second_at_most"], case["workers_for_that"]
    print(f"An H200 consumes at most {bound:.0f} pairs per second (computed). Workers required to reach this rate:")
    print(", ".join(f"{name} {count:.1f}" for name, count in workers.items()))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
