"""The corpus of a stage: its rows, chosen and prepared as the stage's arguments say."""

import os

from datasets import Array2D, Dataset, Features

from dali_llava.processing import LlavaAudioProcessor
from dali_llava.processing.corpora import load_corpus

from .collators import input_features
from .trainers.stage import StageArguments


def load_rows(arguments: StageArguments, split: str | None = None) -> Dataset:
    """
    Rows of `arguments.split`, or of another `split`, at most `max_samples`.

    Raises:
        ValueError: when corpus, split or an option is unknown, or the split is empty.
    """
    split = split or arguments.split
    rows = load_corpus(arguments.dataset, split, **{"num_proc": os.cpu_count(), **arguments.dataset_options})
    if arguments.max_samples is not None:
        rows = rows.select(range(min(arguments.max_samples, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{arguments.dataset}, split {split}: no rows to train on.")
    return rows


def with_features(rows: Dataset, processor: LlavaAudioProcessor) -> Dataset:
    """The rows with an `input_features` column, (frames, mels) each, computed once and cached by `datasets`."""

    def compute(batch: dict) -> dict:
        return {"input_features": input_features([{"audio": audio} for audio in batch["audio"]], processor).numpy()}

    rows = rows.select_columns(["id", "audio", "frames"])
    extractor = processor.feature_extractor
    shape = (extractor.max_length, extractor.num_mel_bins)
    features = Features({**rows.features, "input_features": Array2D(shape, "float32")})
    del features["audio"]
    rows = rows.map(
        compute, batched=True, batch_size=64, remove_columns="audio", features=features, desc="Spectrograms"
    )
    return rows.with_format("numpy", columns=["input_features"], output_all_columns=True)
