"""The media of a corpus's rows, opened in the workers of a loader; a broken clip gives way to another."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Value
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from dali_llava.processing.corpora.rows import count_frames, open_audio, open_frames
from dali_llava.processing.media import MediaError


logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
MOST_IN_A_ROW = 100  # broken clips, one drawn after the other, before something else must be wrong


def open_frame(row: Row, second: int | None = None) -> Image.Image:
    """A frame of a row as an RGB image, that of a random second by default; MediaError as `open_frames`."""
    second = int(torch.randint(count_frames(row), ())) if second is None else second
    return open_frames(row, [second])[0]


@dataclass
class Clip:
    """An opened row: `image`, RGB, and `audio`, (samples,) float32, where they were asked for."""

    row: Row
    image: Image.Image | None = None
    audio: np.ndarray | None = None


@dataclass
class ClipOpener:
    """
    Opens rows; in place of one that cannot be opened it draws another of the corpus, and counts it.

    Processes that are forked or spawned with an opener, as a loader's workers are, share its count.

    Args:
        spares: rows to draw from: any of a `Dataset`, or the next ones of an endless stream, of which each worker
            reads its own part. None: an error is raised instead.

    Attributes:
        broken: how many clips could not be opened; a clip counts each time it comes up.
    """

    spares: datasets.Dataset | datasets.IterableDataset | None = None
    _count: Any = field(default_factory=lambda: Value("q", 0), repr=False)
    _stream: Iterator[Row] | None = field(default=None, repr=False)

    @property
    def broken(self) -> int:
        return self._count.value

    def __call__(
        self,
        rows: Sequence[Row],
        *,
        image: bool = False,
        audio: bool = False,
        second: int | None = None,
        sampling_rate: int = 16_000,
    ) -> list[Clip]:
        """
        As many clips as rows.

        Args:
            image, audio: what to open of a row.
            second: of the frame; a random one by default. A clip that ends before is broken.
            sampling_rate: of the sound, in Hz.

        Raises:
            MediaError: a clip is broken and there are no `spares`, or 100 of them were in a row.
        """

        def opened(row: Row) -> Clip:
            return Clip(
                row, open_frame(row, second) if image else None, open_audio(row, sampling_rate) if audio else None
            )

        return [self._try(opened, row) for row in rows]

    def _try(self, opened: Callable[[Row], Clip], row: Row) -> Clip:
        for _ in range(MOST_IN_A_ROW):
            try:
                return opened(row)
            except MediaError as error:
                if self.spares is None:
                    raise
                with self._count.get_lock():
                    self._count.value += 1
                logger.warning("%s; another clip is taken in its place", error)
                last = error
                row = self._draw()
        raise MediaError(f"{MOST_IN_A_ROW} clips in a row cannot be opened, the last: {last}") from last

    def _draw(self) -> Row:
        if isinstance(self.spares, datasets.Dataset):
            return self.spares[int(torch.randint(len(self.spares), ()))]
        if self._stream is None:
            self._stream = iter(self.spares)
        return next(self._stream)
