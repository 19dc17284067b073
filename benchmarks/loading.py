"""How many pairs a second does one worker make ready for the alignment, and does its memory stay flat?

One core, one thread, the full-size input: 10 s of sound to 1024 x 128 filter banks, a random one of ten frames to
336 x 336 pixels, augmentation included. The clips lie as videos (the baseline), as shards that are read in any order,
and as shards that are streamed. Then a stream of many pairs, with the resident memory after each batch.

A GPU cannot ask for more pairs than its arithmetic allows: audio tower forward and backward, vision tower forward, at
the speed that an H200 reaches in bf16. That bound is worked out, not measured, and so is the number of workers that it
asks for. Five minutes:

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


TITLE = "Pairs a second and worker (min / median / max)"
COLUMNS = ["clips lie as", "seconds a batch", "pairs a second", "times faster"]
BASELINE = "videos"
H200_FLOPS = 790e12  # a second in bf16, of large matrices
MEMORY_GROWTH = 200  # MB at most
WARM_UP = 500  # pairs of the stream before memory is compared


def full_size_processor() -> LlavaAudioProcessor:
    """The processor of the full-size model but for its vocabulary, which holds the placeholders alone."""
    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "<audio>", "<prefix>"]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    names = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), words, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), extra_special_tokens=words[4:], **names)
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    return LlavaAudioProcessor(CLIPImageProcessor(**size), tokenizer, LlavaAudioFeatureExtractor())


def step_flops() -> float:
    """Floating-point operations that a pair costs an alignment step: products of matrices alone, no objective."""
    audio, vision = CavMaeAudioConfig(), LlavaAudioConfig().vision_config
    rows, columns = audio.grid_size
    layers = audio.num_hidden_layers + audio.num_joint_layers
    tower = forward_flops(rows * columns, audio.hidden_size, audio.intermediate_size, layers)
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    # All but the last layer: the penultimate one's tokens are the image's.
    shown = forward_flops(patches, vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers - 1)
    return 3 * tower + shown


def forward_flops(tokens: int, width: int, inner: int, layers: int) -> float:
    """Of a transformer: four projections and two matrices of the MLP a token, and attention."""
    return layers * (2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width)


def batches(rows: datasets.Dataset | datasets.IterableDataset, size: int) -> Iterator[list[dict]]:
    """Batches without end, as a loader's worker makes them."""
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
    """Seconds, ratios and pairs a second of each way."""

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
    """Resident memory after the first pairs of a stream and at its highest from there on, in MB."""
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
    parser.add_argument("--clips", type=positive_int, default=32, help="clips of 10 s to make (default: 32)")
    parser.add_argument("--batch", type=positive_int, default=32, help="pairs a batch (default: 32)")
    parser.add_argument("--repeats", type=positive_int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--streamed", type=positive_int, default=5000, help="pairs of the long stream (default: 5000)")
    parser.add_argument("--output", type=Path, default=RESULTS / "loading.json", help="record of the run")
    return parser.parse_args(words)


def measure(folder: Path, arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """All figures for clips made in `folder`, and what is required of them."""
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
    return case, [must(f"MB more over {memory['pairs']} streamed pairs", growth, at_most=MEMORY_GROWTH)]


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
    print(f"An H200 asks for {bound:.0f} pairs a second at most (worked out), so for the output of so many workers:")
    print(", ".join(f"{name} {count:.1f}" for name, count in workers.items()))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
