"""Caption audio, image and video files: print one line per file, `FILE<TAB>CAPTION`.

By default, the caption uses all that a file contains: its sound, its picture, or for a video with sound both, with the
frame in the middle of the captioned part, or with several frames of it if the model takes several. For a folder, all
media files in it are captioned, recursively and in sorted order. The audio window of a model is limited (10.24 s at
full size): of a longer file, only the beginning is captioned, or every window with --timestamps. A file that cannot be
captioned is reported on stderr, the other files are still captioned, and the exit code is 1.

examples:
  dali-llava caption runs/quickstart/model clip.mp4 bark.wav photo.jpg
  dali-llava caption runs/quickstart/model recordings/ --modality audio --json
  dali-llava caption runs/quickstart/model long.mp3 --timestamps
  dali-llava caption runs/quickstart/model -- -name-with-a-dash.wav
"""

import argparse
import json
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
    """A part of a file, in seconds. `end` is None if the end of the file is unknown."""

    start: float
    end: float | None

    @property
    def length(self) -> float | None:
        return None if self.end is None else self.end - self.start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_model_arguments(parser)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="wav, flac, ogg, mp3, m4a, mp4, mkv, webm, jpg, png, ..., or a folder",
    )
    parser.add_argument(
        "--modality",
        choices=("auto", *MODALITIES),
        default="auto",
        help="modality to caption from; auto, the default, uses all that the file contains",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="question for the model; default: what can be heard, or for images what can be seen",
    )
    parser.add_argument(
        "--prefix",
        action=argparse.BooleanOptionalAction,
        help="add the learned prefix before the prompt, or omit it; default: as the model was trained",
    )
    parser.add_argument(
        "--timestamps", action="store_true", help="caption every window of each file, with start and end in seconds"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Caption `args.inputs`. Return 1 if any file failed, otherwise 0."""
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
    session = _Session(args, window, processor.frame_options, processor.sound_prompt)
    total = None if args.timestamps else len(session.files)
    for result in runner.run(session.samples(), total=total):
        session.report(result)
    return 1 if session.failed else 0


class _Session:
    """One call of the command: converts the inputs to samples and prints the results."""

    def __init__(self, args: argparse.Namespace, window: float, frame_options: dict, sound_prompt: str):
        self.args = args
        self.window = window
        self.frame_options = frame_options
        self.sound_prompt = sound_prompt
        self.failed = False
        self.numbers = count()
        self.files = self._files()
        self.places: dict[str, tuple[str, Span]] = {}  # sample id -> file and span

    def samples(self) -> Iterator["Sample"]:
        """Yield one sample per file, or per window with --timestamps. Files that cannot be read are reported."""
        from dali_llava.processing.media import probe

        for file in self.files:
            try:
                info = probe(file)
                modality = _modality(file, info, self.args.modality)
                if self.args.timestamps:
                    yield from self._windows(file, info, modality)
                else:
                    yield self._whole(file, info, modality)
            except (ValueError, OSError) as error:
                self._fail(file, error)

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
            row |= {"seconds": round(result.seconds, 3)}
            # For a name that is not UTF-8, escapes are valid JSON but its bytes are not.
            _print(json.dumps(row, ensure_ascii=not _is_text(file)))
        elif self.args.timestamps:
            _print(f"{_on_one_line(file)}\t{span.start:.2f}-{span.end:.2f}\t{result.caption}")
        else:
            _print(f"{_on_one_line(file)}\t{result.caption}")

    def _files(self) -> list[str]:
        """Return the inputs, with each folder replaced by its media files."""
        from dali_llava.processing.corpora.names import KINDS
        from dali_llava.processing.media import find_file, media_files

        files = []
        for name in self.args.inputs:
            if not find_file(name).is_dir():
                files.append(name)
                continue
            found = media_files(find_file(name), KINDS)
            if not found:
                self._fail(
                    name, f"{name}: is a directory without media files; give a media file, or a folder of media files"
                )
            files += found
        return files

    def _whole(self, file: str, info: "MediaInfo", modality: str) -> "Sample":
        """Return the sample of a whole file, with frames of the part whose sound fits the window.

        The media are decoded when the batch of the sample is processed.
        """
        from dali_llava.eval.runner import SAMPLING_RATE
        from dali_llava.processing.media import load_audio, load_clip_frames, load_image

        if modality == "image":
            span = Span(0.0, info.duration)
        else:  # The frames of a long video come from the part that fits the window.
            span = Span(0.0, self.window if info.duration is None else min(self.window, info.duration))
        image = audio = None
        if modality != "image":
            # The last spectrogram frame covers 15 ms after the window. The feature extractor cuts the rest.
            audio = partial(load_audio, file, sampling_rate=SAMPLING_RATE, start=0.0, duration=span.length + 0.05)
        if info.kind == "image":
            image = partial(load_image, file)
        elif modality != "audio":
            image = partial(load_clip_frames, file, span.start, span.end, **self.frame_options)
        return self._sample(file, span, modality, image, audio)

    def _windows(self, file: str, info: "MediaInfo", modality: str) -> Iterator["Sample"]:
        """Yield the samples of all windows. After the end of the sound of a video, windows only have an image."""
        from dali_llava.eval.runner import SAMPLING_RATE
        from dali_llava.processing.media import load_windows

        if info.kind == "image":
            raise ValueError(f"{file}: a picture has no windows; leave out --timestamps")
        hears, sees = modality != "image", modality != "audio"
        for window in load_windows(file, self.window, SAMPLING_RATE, audio=hears, image=sees, **self.frame_options):
            seen = "image" if window.audio is None else modality
            yield self._sample(file, Span(window.start, window.end), seen, list(window.frames) or None, window.audio)

    def _sample(self, file: str, span: Span, modality: str, image, audio) -> "Sample":
        from dali_llava.eval.runner import Sample
        from dali_llava.processing import SEE_PROMPT

        default_prompt = SEE_PROMPT if modality == "image" else self.sound_prompt
        sample = Sample(
            id=str(next(self.numbers)),
            prompt=default_prompt if self.args.prompt is None else self.args.prompt,
            image=image,
            audio=audio,
            prefix=self.args.prefix,
        )
        self.places[sample.id] = file, span
        return sample

    def _fail(self, file: str, error: Exception | str) -> None:
        self.failed = True
        message = " ".join(str(error).split())
        if " ".join(file.split()) not in message:
            message = f"{file}: {message}"
        _print(f"dali-llava: error: {_on_one_line(message)}", stream=sys.stderr)


def _is_text(name: str) -> bool:
    """Whether a file name is valid Unicode. Python decodes invalid bytes to lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _on_one_line(text: str) -> str:
    """Escape control characters, so that a tab or a newline in a file name does not split a line."""
    return "".join(repr(letter)[1:-1] if letter < " " else letter for letter in text)


def _modality(file: str, info: "MediaInfo", wanted: str) -> str:
    """
    Return the modality to caption a file from.

    Raises:
        ValueError: if the file does not contain the modality.
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

    stream = stream or sys.stdout
    if stream is sys.stdout and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="file-names")  # see dali_llava.processing.media.names
    # tqdm.write moves the progress bar out of the way. Flushing makes each caption available to a pipe immediately.
    tqdm.write(line, file=stream)
    stream.flush()
