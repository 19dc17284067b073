"""Opening the media of corpus rows in data loading workers, with replacement of broken clips."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Value
from typing import Any

import datasets
import numpy as np
from PIL import Image

from dali_llava.processing.corpora.rows import count_frames, open_audio, open_clip_frames, open_frames
from dali_llava.processing.media import MediaError


logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
MOST_IN_A_ROW = 100  # consecutive broken clips before an error is raised


def open_frame(row: Row, second: int | np.random.Generator) -> Image.Image:
    """Open the frame of a row at a second, or at one that a generator draws; raises MediaError as `open_frames`."""
    if isinstance(second, np.random.Generator):
        second = int(second.integers(count_frames(row)))
    return open_frames(row, [second])[0]


@dataclass
class OpenedClip:
    """An opened row: `image` (RGB, or a list of frames) and `audio` (samples,) float32, or None if not requested."""

    row: Row
    image: Image.Image | list[Image.Image] | None = None
    audio: np.ndarray | None = None


@dataclass
class ClipOpener:
    """
    Opens the media of rows. A row that cannot be opened is counted and replaced with another row of the corpus.

    Data loading workers and other child processes share the count of their parent.

    Args:
        spares: replacement rows: random rows of a `Dataset`, or the next rows of an infinite stream, of which each
            worker reads its own part. If None, a broken row raises an error.

    Attributes:
        broken: number of clips that could not be opened; a clip is counted each time it is drawn.
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
        generators: Sequence[np.random.Generator],
        *,
        image: bool = False,
        audio: bool = False,
        second: int | None = None,
        frame_options: Mapping[str, Any] | None = None,
        sampling_rate: int = 16_000,
    ) -> list[OpenedClip]:
        """
        Open one clip per row.

        Args:
            rows: rows of a corpus.
            generators: random generators of the rows, for the frame and the replacement of a broken clip.
            image: whether to open a frame, or several.
            audio: whether to open the audio.
            second: time of the frame in seconds, random by default. A clip that ends before it is broken.
            frame_options: options of `open_clip_frames`, to open frames of the whole clip; one frame by default.
            sampling_rate: sampling rate of the audio in Hz.

        Raises:
            MediaError: if a clip is broken and `spares` is None, or if 100 consecutive clips are broken.
        """

        def opened(row: Row, generator: np.random.Generator) -> OpenedClip:
            picture = None
            if image and frame_options is not None:
                picture = open_clip_frames(row, **frame_options)
            elif image:
                picture = open_frame(row, generator if second is None else second)
            return OpenedClip(row, picture, open_audio(row, sampling_rate) if audio else None)

        return [self._try(opened, row, generator) for row, generator in zip(rows, generators, strict=True)]

    def _try(
        self,
        opened: Callable[[Row, np.random.Generator], OpenedClip],
        row: Row,
        generator: np.random.Generator,
    ) -> OpenedClip:
        for _ in range(MOST_IN_A_ROW):
            try:
                return opened(row, generator)
            except MediaError as error:
                if self.spares is None:
                    raise
                with self._count.get_lock():
                    self._count.value += 1
                logger.warning("%s; the clip is replaced with another one", error)
                last = error
                row = self._draw(generator)
        raise MediaError(f"{MOST_IN_A_ROW} consecutive clips cannot be opened; last error: {last}") from last

    def _draw(self, generator: np.random.Generator) -> Row:
        if isinstance(self.spares, datasets.Dataset):
            return self.spares[int(generator.integers(len(self.spares)))]
        if self._stream is None:
            self._stream = iter(self.spares)
        return next(self._stream)
