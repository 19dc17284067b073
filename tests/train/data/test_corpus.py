"""Rows of a stage: their number and selection."""

import pytest

from dali_llava.train.arguments import StageArguments
from dali_llava.train.data.corpus import load_rows


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
