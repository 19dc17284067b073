"""A stage's rows: as many as asked for, and spectrograms that are stored as they would be computed."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from dali_llava.processing.media import load_audio
from dali_llava.train.collators import AlignmentCollator
from dali_llava.train.corpus import load_rows, with_features
from dali_llava.train.trainers import StageArguments


@pytest.fixture
def stored(avworld_processor, rows) -> Dataset:
    return with_features(Dataset.from_list(rows), avworld_processor)


def test_stored_spectrograms_are_the_extractors(stored, avworld_processor, rows):
    assert set(stored.column_names) == {"id", "frames", "input_features"}
    extractor = avworld_processor.feature_extractor
    for index, row in enumerate(rows):
        expected = extractor(load_audio(row["audio"]["bytes"]), return_tensors="np")["input_features"][0]
        found = np.asarray(stored[index]["input_features"])
        assert found.dtype == np.float32 and found.shape == (256, 64)
        # filter banks of a clip alone and of a batch add up in another order
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert (stored[index]["id"], stored[index]["frames"]) == (row["id"], row["frames"])


def test_stored_spectrograms_give_the_same_batch(stored, avworld_processor, rows):
    collator = AlignmentCollator(avworld_processor, augment=False)
    expected, batch = collator(rows), collator([stored[index] for index in range(len(rows))])
    assert set(batch) == set(expected)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("max_samples", "count"), [(None, 6), (4, 4), (9, 6)])
def test_rows_are_the_splits_first(tmp_path, max_samples, count):
    arguments = StageArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        split="shots",
        max_samples=max_samples,
        dataset_options={"sizes": {"shots": 6, "val": 3}},
    )
    assert load_rows(arguments)["id"][:] == [f"shots-{index:06d}" for index in range(count)]
    other = load_rows(arguments, split="val")["id"][:]
    assert other == [f"val-{index:06d}" for index in range(min(3, max_samples or 3))]


def test_split_without_rows_is_an_error(tmp_path):
    arguments = StageArguments(output_dir=str(tmp_path), use_cpu=True, split="shots", max_samples=0)
    with pytest.raises(ValueError, match="avworld, split shots: no rows to train on"):
        load_rows(arguments)
