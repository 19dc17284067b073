"""Rows with a question and a reference caption as its answer."""

from datasets import Dataset

from dali_llava.train.arguments import StageArguments


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
