"""Random numbers of collators: each row has a generator of its own, seeded by the seed, the epoch and the row's id."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawValue
from typing import Any

import numpy as np
from transformers import TrainerCallback


@dataclass
class Draws:
    """
    Creates the random generators of the rows of a batch.

    A generator depends on the seed, the epoch and the `id` of its row. It does not depend on the other rows of the
    batch, the rank, the DataLoader worker or earlier draws, so that two ranks with half of each batch draw what one
    process draws, and a resumed run draws what an unbroken run draws. If a row occurs several times in a batch, each
    occurrence has a generator of its own.

    A stream that repeats has no epochs. With `streaming`, the generator therefore also depends on the number of rows
    that this process has collated. A resumed run collates the skipped batches again, so that the number is the same.

    DataLoader workers and other child processes share the epoch of their parent.

    Args:
        seed: seed of the run.
        streaming: whether the rows come from a stream.
    """

    seed: int = 0
    streaming: bool = False
    _epoch: Any = field(default_factory=lambda: RawValue("q", 0), repr=False, compare=False)
    _collated: int = field(default=0, init=False, repr=False, compare=False)

    @property
    def epoch(self) -> int:
        """Current epoch, counted from 0; set by `DrawsEpoch`."""
        return self._epoch.value

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[np.random.Generator]:
        """
        Return one generator per row.

        Raises:
            ValueError: if a row has no `id`.
        """
        generators, seen = [], Counter()
        for row in rows:
            if "id" not in row:
                raise ValueError(f"rows need the column id to seed their random numbers; columns: {', '.join(row)}.")
            name = str(row["id"])
            occurrence = self._collated if self.streaming else seen[name]
            self._collated += 1
            seen[name] += 1
            key = [self.seed, self.epoch, occurrence, int.from_bytes(name.encode(), "little")]
            generators.append(np.random.Generator(np.random.PCG64(key)))
        return generators


class DrawsEpoch(TrainerCallback):
    """
    Sets the epoch of `draws` at the start of each epoch, before the DataLoader starts or resumes its workers.

    Args:
        draws: the draws of the collator of the training batches.
    """

    def __init__(self, draws: Draws):
        self.draws = draws

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.draws.epoch = int(state.epoch or 0)  # after a resume in mid-epoch, state.epoch has a fraction
