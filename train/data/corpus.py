"""Load and select the rows of a corpus that a stage trains on."""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset

from dali_llava.modeling import LlavaAudioTowers
from dali_llava.processing import LlavaAudioProcessor
from dali_llava.processing.corpora import load_corpus
from dali_llava.train.arguments import SoundArguments, StageArguments
from dali_llava.train.data.feature_cache import FeatureChoice, with_features


SEEN_FIRST = 20  # number of rows checked for pictures; at least one must have one
KEPT = "kept.txt"  # list in the output folder of a pre-filter, with one id per line


def load_rows(arguments: StageArguments, split: str | None = None) -> Dataset:
    """
    Load the rows of a split, at most `arguments.max_samples`.

    Args:
        arguments: arguments of the stage.
        split: split to load instead of `arguments.split`. `kept` and `max_samples` apply to the latter only.

    Raises:
        ValueError: if the corpus, the split or an option is unknown, or the split is empty.
        FileNotFoundError, ValueError: as in `keep_rows`.
    """
    selected = split in (None, arguments.split)
    split = split or arguments.split
    rows = load_corpus(arguments.dataset, split, **{"num_proc": os.cpu_count(), **arguments.dataset_options})
    if selected and arguments.kept is not None:
        rows = keep_rows(rows, arguments.kept)
    if selected and arguments.max_samples is not None:
        rows = rows.select(range(min(arguments.max_samples, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{arguments.dataset}, split {split}: no rows to train on.")
    return rows


def evaluation_rows(arguments: StageArguments) -> Dataset | None:
    """Load the rows of `arguments.eval_split`, all of them, or return None. Raises the errors of `load_rows`."""
    if arguments.eval_split is None:
        return None
    return load_rows(arguments, arguments.eval_split)


def stream_rows(arguments: SoundArguments) -> IterableDataset:
    """
    Load the rows of `load_rows` as a stream that repeats without end.

    Ranks and DataLoader workers read their own parts of the stream if the corpus has enough shards.

    Raises:
        ValueError: as in `load_rows`, or if an argument is not supported for streams.
        FileNotFoundError: as in `load_rows`.
    """
    if arguments.max_steps <= 0:
        raise ValueError("streaming: a stream has no end; give the number of steps, --max_steps N.")
    for name, off in {"cache_features": "none", "halve_every": 0}.items():
        if getattr(arguments, name, off) != off:
            raise ValueError(
                f"streaming: {name} is not supported for streams; disable one of the two, --{name} {off}."
            )
    rows = load_corpus(arguments.dataset, arguments.split, streaming=True, **arguments.dataset_options)
    if arguments.kept is not None:
        kept = kept_ids(arguments.kept)
        rows = rows.filter(lambda name: name in kept, input_columns="id")
    if arguments.max_samples is not None:
        rows = rows.take(arguments.max_samples)
    if next(iter(rows), None) is None:
        raise ValueError(f"{arguments.dataset}, split {arguments.split}: no rows to train on.")
    return rows.repeat(None)


def open_rows(arguments: SoundArguments, pictures: bool) -> Dataset | IterableDataset:
    """
    Load the rows of a stage that trains the audio tower, as a stream if `arguments.streaming`.

    Args:
        arguments: arguments of the stage.
        pictures: whether the stage needs pictures.

    Raises:
        ValueError, FileNotFoundError: as in `load_rows`, `stream_rows` and `check_pictures`.
    """
    rows = stream_rows(arguments) if arguments.streaming else load_rows(arguments)
    if pictures:
        check_pictures(rows, arguments)
    return rows


def shuffled(rows: Dataset | IterableDataset, arguments: SoundArguments) -> Dataset | IterableDataset:
    """Shuffle a stream. A `Dataset` is returned unchanged, because the DataLoader shuffles it in each epoch."""
    if not arguments.streaming:
        return rows
    return rows.shuffle(arguments.seed, buffer_size=arguments.shuffle_buffer)


def check_pictures(rows: Iterable[dict], arguments: SoundArguments, split: str | None = None) -> None:
    """Raise a ValueError if none of the first rows, of `split` or else `arguments.split`, has a picture."""
    if not any(row["frames"] for row in islice(rows, SEEN_FIRST)):
        raise ValueError(
            f"{arguments.dataset}, split {split or arguments.split}: no pictures, which the alignment needs."
        )


def kept_ids(folder: str | Path) -> set[str]:
    """Return the ids that a pre-filter kept. Raises FileNotFoundError if the folder has no finished pre-filter."""
    path = Path(folder) / KEPT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the list does not exist; complete the run of train/prefilter.py first.")
    return set(path.read_text(encoding="utf-8").splitlines())


def keep_rows(rows: Dataset, folder: str | Path) -> Dataset:
    """
    Select the rows that a pre-filter kept, in their order.

    Args:
        rows: rows of the corpus and split that were filtered. Rows that the pre-filter did not score are not kept.
        folder: output folder of the pre-filter.

    Raises:
        FileNotFoundError: if the folder has no finished pre-filter.
        ValueError: if none of the rows was kept.
    """
    kept = kept_ids(folder)
    chosen = [index for index, name in enumerate(rows["id"]) if name in kept]
    if not chosen:
        raise ValueError(
            f"{Path(folder) / KEPT}: contains none of the ids of these {len(rows)} rows; filter this corpus and split."
        )
    return rows.select(chosen)


def store_features(
    rows: Dataset,
    towers: LlavaAudioTowers,
    processor: LlavaAudioProcessor,
    arguments: SoundArguments,
    split: str | None = None,
) -> Dataset:
    """
    Store the features that `arguments.cache_features` selects; see `with_features`.

    Args:
        rows: rows of a corpus.
        towers: the model that encodes the images. Its vision tower is moved to the device of the stage.
        processor: its processor.
        arguments: arguments of the stage. If they select one `frame`, only this frame is stored.
        split: split of the rows, by default `arguments.split`; a subfolder of `arguments.feature_cache`.

    Returns:
        the rows with their features; the given rows if `cache_features` is `none`.
    """
    if arguments.cache_features == "none":
        return rows
    frame = getattr(arguments, "frame", None)
    if arguments.cache_features == "all":
        choice = FeatureChoice(frames=None, frame=frame, sounds=True, dtype=torch.float32)
    else:
        choice = FeatureChoice(frames=arguments.cache_frames, frame=frame)
    root = arguments.feature_cache
    return with_features(
        rows,
        towers,
        processor,
        choice,
        folder=None if root is None else Path(root) / (split or arguments.split),
        device=arguments.device,
        num_workers=arguments.dataloader_num_workers,
    )
