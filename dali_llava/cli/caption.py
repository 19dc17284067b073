"""Caption sound, picture and video files: one line a file, `FILE<TAB>CAPTION`.

A sound is captioned from its audio, a picture from its pixels, a video with sound from both: its audio and the frame
in the middle of it. A model hears as much as its window holds (10.24 s at full size); of a longer file it hears the
beginning, or with --timestamps every window in turn. A file that cannot be captioned is reported on stderr, the
others go on, and the exit code is 1.

examples:
  dali-llava caption runs/quickstart/model clip.mp4 bark.wav photo.jpg
  dali-llava caption runs/quickstart/model *.mp4 --modality audio --json
  dali-llava caption runs/quickstart/model long.mp3 --timestamps
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from .loading import add_model_arguments, check_model, load_captioner


if TYPE_CHECKING:
    from dali_llava.eval.runner import CaptionResult, Sample
    from dali_llava.processing.media import MediaInfo


MODALITIES = ("audio", "image", "audiovisual")


@dataclass(frozen=True)
class Span:
    """A stretch of a file, in seconds; `end` is None where the file's end is not known."""

    start: float
    end: float | None

    @property
    def middle(self) -> float:
        return self.start if self.end is None else (self.start + self.end) / 2

    @property
    def length(self) -> float | None:
        return None if self.end is None else self.end - self.start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_model_arguments(parser)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="wav, flac, ogg, mp3, m4a, mp4, mkv, webm, jpg, png, ..."
    )
    parser.add_argument(
        "--modality",
        choices=("auto", *MODALITIES),
        default="auto",
        help="what to caption from; auto, the default, takes what the file holds",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="the question; default: what can be heard, or of a picture what can be seen"
    )
    parser.add_argument(
        "--prefix",
        action=argparse.BooleanOptionalAction,
        help="put the learned prefix before the prompt, or leave it out; default: as the model was trained",
    )
    parser.add_argument("--timestamps", action="store_true", help="caption window after window of each whole file")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Caption `args.inputs`; 1 if any failed, else 0."""
    check_model(args.model)  # before torch is imported, which takes seconds

    from rich.console import Console

    with Console(stderr=True).status(f"loading {args.model}"):
        from dali_llava.eval.runner import CaptionRunner

        model, processor = load_captioner(args.model, args.device, args.dtype)
    runner = CaptionRunner(
        model,
        processor,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
    )
    extractor = processor.feature_extractor
    window = extractor.max_length * extractor.hop_length / extractor.sampling_rate
    session = _Session(args, window)
    total = None if args.timestamps else len(args.inputs)
    for result in runner.run(session.samples(), total=total):
        session.report(result)
    return 1 if session.failed else 0


class _Session:
    """One call of the command: turns its inputs into samples and prints what becomes of them."""

    def __init__(self, args: argparse.Namespace, window: float):
        self.args = args
        self.window = window
        self.failed = False
        self.numbers = count()
        self.places: dict[str, tuple[str, Span]] = {}  # sample id -> file and span

    def samples(self) -> Iterator["Sample"]:
        """A sample a file, or with --timestamps a sample a window; a file that has none is reported."""
        from dali_llava.processing.media import probe

        for file in self.args.inputs:
            try:
                info = probe(file)
                modality = _modality(file, info, self.args.modality)
                spans = self._spans(file, info, modality)
            except (ValueError, OSError) as error:
                self._fail(file, error)
                continue
            for span in spans:
                sample = self._sample(file, info, modality, span)
                self.places[sample.id] = file, span
                yield sample

    def report(self, result: "CaptionResult") -> None:
        """Print a caption to stdout, or an error to stderr."""
        file, span = self.places.pop(result.id)
        if result.error is not None:
            self._fail(file, result.error)
            return
        if self.args.json:
            row = {"file": file, "modality": result.modality, "caption": result.caption}
            if self.args.timestamps:
                row |= {"start": round(span.start, 3), "end": round(span.end, 3)}
            _print(json.dumps(row | {"seconds": round(result.seconds, 3)}, ensure_ascii=False))
        elif self.args.timestamps:
            _print(f"{file}\t{span.start:.2f}-{span.end:.2f}\t{result.caption}")
        else:
            _print(f"{file}\t{result.caption}")

    def _spans(self, file: str, info: "MediaInfo", modality: str) -> list[Span]:
        from dali_llava.processing import MIN_DURATION

        if self.args.timestamps:
            if info.kind == "image":
                raise ValueError(f"{file}: a picture has no windows; leave out --timestamps")
            if info.duration is None:
                raise ValueError(f"{file}: its duration is unknown; remux it, or leave out --timestamps")
            # A last window that is too short to be heard is left out.
            windows = max(1, math.ceil((info.duration - MIN_DURATION) / self.window))
            starts = [number * self.window for number in range(windows)]
            return [Span(start, min(start + self.window, info.duration)) for start in starts]
        if modality == "image":
            return [Span(0.0, info.duration)]
        # The frame of a long video is taken from the part that is heard.
        return [Span(0.0, self.window if info.duration is None else min(self.window, info.duration))]

    def _sample(self, file: str, info: "MediaInfo", modality: str, span: Span) -> "Sample":
        from dali_llava.eval.runner import SAMPLING_RATE, Sample
        from dali_llava.processing import SEE_PROMPT, SOUND_PROMPT
        from dali_llava.processing.media import load_audio, load_frames, load_image

        image = audio = None
        if modality != "image":
            # The last frame of a window reaches 15 ms past it; the extractor cuts what is too much.
            duration = span.length + 0.05
            audio = partial(load_audio, file, sampling_rate=SAMPLING_RATE, start=span.start, duration=duration)
        if info.kind == "image":
            image = partial(load_image, file)
        elif modality != "audio":
            image = partial(_frame, load_frames, file, span.middle)
        default_prompt = SEE_PROMPT if modality == "image" else SOUND_PROMPT
        return Sample(
            id=str(next(self.numbers)),
            prompt=default_prompt if self.args.prompt is None else self.args.prompt,
            image=image,
            audio=audio,
            prefix=self.args.prefix,
        )

    def _fail(self, file: str, error: Exception | str) -> None:
        self.failed = True
        message = " ".join(str(error).split())
        if file not in message:
            message = f"{file}: {message}"
        _print(f"dali-llava: error: {message}", stream=sys.stderr)


def _frame(load_frames, file: str, time: float):
    return load_frames(file, time)[0]


def _modality(file: str, info: "MediaInfo", wanted: str) -> str:
    """The modality to caption a file from.

    Raises:
        ValueError: the file does not hold what is wanted.
    """
    sound = info.kind == "audio" or info.has_audio
    picture = info.kind != "audio"
    held = "audiovisual" if sound and picture else "audio" if sound else "image"
    if wanted == "auto":
        return held
    kind = {"audio": "sound file", "image": "picture", "video": "video"}[info.kind]
    if wanted != "image" and not sound:
        raise ValueError(f"{file}: this {kind} has no sound; use --modality image")
    if wanted != "audio" and not picture:
        raise ValueError(f"{file}: this {kind} has no picture; use --modality audio")
    return wanted


def _print(line: str, stream=None) -> None:
    from tqdm import tqdm

    # tqdm lifts its bar out of the line's way, and the flush lets a reader of the pipe see each caption at once.
    tqdm.write(line, file=stream or sys.stdout)
    (stream or sys.stdout).flush()
