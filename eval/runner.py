"""The caption runner: samples in, captions out, in batches, resumable. Everything that captions goes through it.

    samples -> decode -> batch -> processor -> model.generate -> CaptionResult

A sample that cannot be decoded or that the processor rejects becomes a result with an error; the others go on.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from operator import length_hint
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.integrations.accelerate import load_offloaded_parameter


SAMPLING_RATE = 16_000  # Hz, of every sample's audio
LINE_START = b'{"id": '  # of a line in a file of results


@dataclass
class Sample:
    """One thing to caption.

    Attributes:
        id: names the sample in the results. In a file of results it stands for the media too: a sample whose media
            have changed needs another id.
        prompt: the question, without template or placeholders.
        image: RGB picture, or a function that decodes it when its batch comes up.
        audio: mono waveform (samples,) at 16 kHz in [-1, 1], or a function that decodes it.
        prefix: whether the learned prefix precedes the question; None follows the checkpoint, which lists the
            modalities that it was trained to caption with the prefix (`config.prefix_modalities`).
    """

    id: str
    prompt: str
    image: Image.Image | Callable[[], Image.Image] | None = None
    audio: np.ndarray | Callable[[], np.ndarray] | None = None
    prefix: bool | None = None

    @property
    def modality(self) -> str:
        """`audio`, `image`, `audiovisual`, or `text` for a sample without media."""
        if self.audio is not None:
            return "audio" if self.image is None else "audiovisual"
        return "text" if self.image is None else "image"


@dataclass
class CaptionResult:
    """What became of a sample.

    Attributes:
        id: the sample's.
        modality: the sample's.
        caption: the generated text; None where there was an error.
        seconds: time spent on it: its decoding, and its share of its batch.
        error: one line that tells what went wrong, or None.
    """

    id: str
    modality: str
    caption: str | None
    seconds: float
    error: str | None = None


class CaptionRunner:
    """Captions samples with a model and its processor.

    Args:
        model: `LlavaAudioForConditionalGeneration`, or anything with `generate`.
        processor: its `LlavaAudioProcessor`.
        batch_size: samples a forward pass. It changes the speed, not the captions: batches are left padded.
        max_new_tokens: the longest caption, in tokens.
        num_beams: 1 is greedy search.
        do_sample: draw tokens at `temperature`, from torch's global generator, which the caller seeds.
        temperature: only with `do_sample`.
        device: where to move the model; default: where it is.
        dtype: what to convert the model to; default: as it is.

    Raises:
        ValueError: a count below 1, or a temperature without sampling or not above 0.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if temperature is not None and not do_sample:
            raise ValueError("temperature has no effect without do_sample=True")
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}; do_sample=False is greedy")
        if device is not None or dtype is not None:  # a quantised or offloaded model cannot be moved at all
            model = model.to(device=device, dtype=dtype)
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": do_sample}
        if temperature is not None:
            self.generation["temperature"] = temperature

    def run(
        self,
        samples: Iterable[Sample],
        out: str | os.PathLike | None = None,
        progress: bool = True,
        total: int | None = None,
    ) -> Iterator[CaptionResult]:
        """Caption samples, in their order; nothing is decoded before its batch comes up.

        Args:
            samples: any iterable; a generator is consumed a batch at a time.
            out: a file of JSON lines, to which each caption is appended as soon as it is there. A sample that stands
                in it with the same id, weights and settings is answered from it; errors are tried again.
            progress: a bar on stderr, where that is a terminal, once the run has taken two seconds.
            total: the number of samples, for the bar, where `samples` cannot tell.

        Raises:
            ValueError: an id that comes twice with `out`, or a line of `out` that is no result.
        """
        store = None if out is None else _ResultFile(Path(out), self._settings())
        settled = map(self._settle_prefix, samples)
        bar = tqdm(
            total=total if total is not None else length_hint(samples) or None,
            desc="captions",
            unit="",
            delay=2,
            disable=None if progress else True,  # None: where stderr is a terminal
            leave=False,
        )
        with bar:
            for pending in self._batches(settled, store):
                for result in self._answer(pending, store):
                    bar.update()
                    yield result

    def _settle_prefix(self, sample: Sample) -> Sample:
        if sample.prefix is not None:
            return sample
        return replace(sample, prefix=sample.modality in self.model.config.prefix_modalities)

    def _batches(self, samples: Iterable[Sample], store: "_ResultFile | None") -> Iterator[list]:
        """Lists, in order, of results already there and of samples to caption, at most `batch_size` of the latter."""
        pending, waiting = [], 0
        for sample in samples:
            done = store.find(sample) if store else None
            pending.append(done or sample)
            waiting += done is None
            if waiting in (0, self.batch_size):
                yield pending
                pending, waiting = [], 0
        if pending:
            yield pending

    def _answer(self, pending: list, store: "_ResultFile | None") -> Iterator[CaptionResult]:
        """The results of one list of `_batches`, in its order."""
        new = {}
        decoded = []
        for sample in (entry for entry in pending if isinstance(entry, Sample)):
            start = time.perf_counter()
            try:
                media = _decode(sample)
            except (ValueError, OSError) as error:
                new[id(sample)] = _failure(sample, time.perf_counter() - start, error)
            else:
                decoded.append((sample, media, time.perf_counter() - start))
        new.update(self._caption(decoded))
        for entry in pending:
            result = new.get(id(entry), entry)
            if store and result is not entry and result.error is None:
                store.append(entry, result)
            yield result

    def _caption(self, decoded: list[tuple]) -> dict[int, CaptionResult]:
        """Caption decoded samples in one batch; where the processor rejects it, one by one, to find the culprit."""
        if not decoded:
            return {}
        start = time.perf_counter()
        try:
            inputs = self._inputs(decoded)
        except (ValueError, OSError) as error:
            if len(decoded) > 1:
                return {key: result for entry in decoded for key, result in self._caption([entry]).items()}
            sample, _, seconds = decoded[0]
            return {id(sample): _failure(sample, seconds + time.perf_counter() - start, error)}
        # `generate` disables gradients; inference mode would besides reject the weights of some quantisations.
        sequences = self.model.generate(**inputs, **self.generation)
        texts = self.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        share = (time.perf_counter() - start) / len(decoded)
        return {
            id(sample): CaptionResult(sample.id, sample.modality, text.strip(), seconds + share)
            for (sample, _, seconds), text in zip(decoded, texts, strict=True)
        }

    def _inputs(self, decoded: list[tuple]):
        text = [
            self.processor.format_prompt(
                sample.prompt, image=image is not None, audio=audio is not None, prefix=sample.prefix
            )
            for sample, (image, audio), _ in decoded
        ]
        images = [image for _, (image, _), _ in decoded if image is not None]
        audio = [audio for _, (_, audio), _ in decoded if audio is not None]
        inputs = self.processor(
            text=text,
            images=images or None,
            audio=audio or None,
            sampling_rate=SAMPLING_RATE,
            return_tensors="pt",
            padding=True,
        )
        inputs = inputs.to(execution_device(self.model))
        # Pictures and fbanks are made in float32; a tower in bfloat16 takes bfloat16.
        for name in ("pixel_values", "input_features"):
            if name in inputs:
                inputs[name] = inputs[name].to(self.model.dtype)
        return inputs

    def _settings(self) -> str:
        """What, besides the sample, a caption depends on."""
        settings = [self.generation, self.processor.to_dict(), str(self.model.dtype), weights_digest(self.model)]
        if self.generation["do_sample"]:
            settings.append(torch.initial_seed())
        return json.dumps(settings, sort_keys=True, default=str)


def execution_device(model: torch.nn.Module) -> torch.device:
    """The device that a model takes its inputs on, also where offloading has left its weights on the meta device."""
    if model.device.type != "meta":
        return model.device
    return torch.device(getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu")


def weights_digest(model: torch.nn.Module, per_tensor: int = 64) -> str:
    """
    A hash that differs between checkpoints: of each tensor's name, shape, and up to `per_tensor` evenly spread values.

    It does not read the whole model (14 GB at full size), and a training step changes some of those values.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.device.type == "meta":
            tensor = load_offloaded_parameter(model, name)
        if hasattr(tensor, "dequantize") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            tensor = tensor.dequantize()  # torchao's and quanto's packed tensors
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // per_tensor)].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


class _ResultFile:
    """The results of earlier runs in a file of JSON lines, and the place of those to come."""

    def __init__(self, path: Path, settings: str):
        self.path = path
        self.settings = settings
        self.seen = set()
        self.results = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
                key = row.pop("fingerprint"), row["id"]
                self.results[key] = CaptionResult(**row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise self._foreign(number) from error
        rest = content[end:]
        if not rest.startswith(LINE_START[: len(rest)]):
            raise self._foreign(number=content.count(b"\n") + 1)
        if rest:  # a run was killed while it wrote its last line
            os.truncate(self.path, end)

    def _foreign(self, number: int) -> ValueError:
        return ValueError(f"{self.path}: line {number} is no caption result; name another file or delete this one")

    def _fingerprint(self, sample: Sample) -> str:
        parts = json.dumps([self.settings, sample.prompt, sample.modality, sample.prefix])
        return hashlib.sha256(parts.encode()).hexdigest()[:32]

    def find(self, sample: Sample) -> CaptionResult | None:
        if sample.id in self.seen:
            raise ValueError(f"sample id {sample.id!r} comes twice; {self.path} needs unique ids")
        self.seen.add(sample.id)
        return self.results.get((self._fingerprint(sample), sample.id))

    def append(self, sample: Sample, result: CaptionResult) -> None:
        line = json.dumps({**asdict(result), "fingerprint": self._fingerprint(sample)}, ensure_ascii=False) + "\n"
        # One unbuffered write a line, so that a kill can at most cut the last line short.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())


def _decode(sample: Sample) -> tuple[Image.Image | None, np.ndarray | None]:
    image = sample.image() if callable(sample.image) else sample.image
    audio = sample.audio() if callable(sample.audio) else sample.audio
    return image, audio


def _failure(sample: Sample, seconds: float, error: Exception) -> CaptionResult:
    return CaptionResult(sample.id, sample.modality, None, seconds, " ".join(str(error).split()))
