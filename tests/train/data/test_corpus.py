"""Rows of a stage: their number, and stored spectrograms and image tokens that equal computed ones."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from dali_llava.processing.media import load_audio
from dali_llava.train.arguments import StageArguments
from dali_llava.train.data.augmentation import UNCHANGED
from dali_llava.train.data.clips import open_frame
from dali_llava.train.data.collators import AlignmentCollator, pixel_values
from dali_llava.train.data.corpus import load_rows, with_features


@pytest.fixture
def stored(captioner, avworld_processor, rows) -> Dataset:
    """The last row has one frame, the others have four."""
    rows = [*rows[:-1], rows[-1] | {"frames": rows[-1]["frames"][:1]}]
    return with_features(Dataset.from_list(rows), captioner.model.train(), avworld_processor)


def test_stored_spectrograms_are_the_extractors(stored, avworld_processor, rows):
    assert set(stored.column_names) == {"id", "input_features", "image_tokens"}
    extractor = avworld_processor.feature_extractor
    for index, row in enumerate(rows):
        expected = extractor(load_audio(row["audio"]["bytes"]), return_tensors="np")["input_features"][0]
        found = np.asarray(stored[index]["input_features"])
        assert found.dtype == np.float32 and found.shape == (256, 64)
        # the filter bank sums in a different order for one clip and for a batch
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert stored[index]["id"] == row["id"]


def test_stored_image_tokens_are_every_frames(stored, captioner, avworld_processor, rows):
    for index, row in enumerate(rows):
        found = torch.as_tensor(stored[index]["image_tokens"])
        assert found.shape == (1 if index == len(rows) - 1 else 4, 36, 32)
        for frame, tokens in enumerate(found):
            pixels = pixel_values([open_frame(row, frame)], avworld_processor)
            with torch.no_grad():
                expected = captioner.eval().model.encode_image(pixels)
            torch.testing.assert_close(tokens[None], expected, rtol=0, atol=1e-5)


def test_stored_features_give_the_same_pairs(stored, captioner, avworld_processor, rows):
    collator = AlignmentCollator(avworld_processor, UNCHANGED, frame=0)
    expected, batch = collator(rows), collator([stored[index] for index in range(len(rows))])
    assert set(batch) == {"id", "input_features", "image_tokens"} and batch["id"] == expected["id"]
    assert torch.equal(batch["input_features"], expected["input_features"])
    with torch.no_grad():
        tokens = captioner.eval().model.encode_image(expected["pixel_values"])
    torch.testing.assert_close(batch["image_tokens"], tokens, rtol=0, atol=1e-5)


def test_augmented_pairs_are_the_same_from_stored_features_and_from_media(stored, captioner, avworld_processor, rows):
    collator = AlignmentCollator(avworld_processor)
    expected, batch = collator(rows[:3]), collator([stored[index] for index in range(3)])
    torch.testing.assert_close(batch["input_features"], expected["input_features"])
    with torch.no_grad():
        tokens = captioner.eval().model.encode_image(expected["pixel_values"])
    torch.testing.assert_close(batch["image_tokens"], tokens, rtol=0, atol=1e-5)


def test_augmented_pairs_draw_a_stored_frame(stored, avworld_processor):
    drawn = AlignmentCollator(avworld_processor)([stored[0]] * 40)["image_tokens"]
    frames = torch.as_tensor(stored[0]["image_tokens"])
    chosen = {index for tokens in drawn for index, frame in enumerate(frames) if torch.equal(tokens, frame)}
    assert chosen == {0, 1, 2, 3}


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


def test_what_a_prefilter_kept_is_used_of_its_split_alone(tmp_path):
    (tmp_path / "kept.txt").write_text("val-000003\nval-000001\n")
    sizes = {"sizes": {"val": 5, "shots": 4}}
    arguments = StageArguments(
        output_dir=str(tmp_path), split="val", dataset_options=sizes, kept=str(tmp_path), use_cpu=True
    )
    assert load_rows(arguments)["id"][:] == ["val-000001", "val-000003"]
    assert len(load_rows(arguments, split="shots")) == 4
    arguments.max_samples = 1
    assert load_rows(arguments)["id"][:] == ["val-000001"]
    arguments.kept = str(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match="kept.txt: the list does not exist; complete the run of train/prefilter.py first"
    ):
        load_rows(arguments)
