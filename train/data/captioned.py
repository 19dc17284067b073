"""Rows with captions to train on."""

from datasets import Dataset

from dali_llava.train.arguments import StageArguments
from dali_llava.train.data.collators import row_modalities
from dali_llava.train.data.corpus import load_rows


def with_references(rows: Dataset, arguments: StageArguments, split: str) -> Dataset:
    """
    Add `question`, the prompt of the stage, and `answer`, the first caption of each row.

    Args:
        rows: rows of a corpus.
        arguments: arguments of a stage with a `prompt`.
        split: split of the rows, for the error message.

    Raises:
        ValueError: a row has no caption.
    """
    if "captions" not in rows.column_names or any(not captions for captions in rows["captions"]):
        raise ValueError(
            f"{arguments.dataset}, split {split}: rows without captions; choose a split whose clips have captions."
        )
    return rows.map(lambda row: {"question": arguments.prompt, "answer": row["captions"][0]})


def captioned_rows(arguments, split: str) -> Dataset:
    """
    Load the rows of a split and check that each has a caption and media.

    Raises:
        ValueError: as in `load_rows`, or if a row has no caption, or no media of any of the modalities.
    """
    rows = load_rows(arguments, split)
    bare, unusable = [], []
    for row in rows.select_columns(["id", "captions", "audio", "frames"]):
        if not row["captions"]:
            bare.append(row["id"])
        if not row_modalities(row, arguments.modalities):
            unusable.append(row["id"])
    place = f"{arguments.dataset}, split {split}"
    if len(bare) == len(rows):
        raise ValueError(
            f"{place}: no captions; use a corpus or a split with captions, or train with train/distill.py."
        )
    for names, lack in ((bare, "caption"), (unusable, f"media for {' or '.join(arguments.modalities)}")):
        if names:
            raise ValueError(
                f"{place}: {len(names)} of {len(rows)} clips have no {lack}, the first is {names[0]}; add it, or "
                "remove these clips from the corpus."
            )
    return rows
