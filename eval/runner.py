"""The caption runner: generates captions of samples in batches, and resumes. All captioning uses it.

    samples -> decode -> batch -> processor -> model.generate -> CaptionResult

A sample that cannot be decoded or that the processor rejects becomes a result with an error; the run continues.
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
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.accelerate import load_offloaded_parameter

from .sampling import IndependentSampling


SAMPLING_RATE = 16_000  # Hz, of every sample's audio
LINE_START = b'{"id": '  # start of each line in a results file

Picture = Image.Image | list[Image.Image]  # a picture, or the frames of a clip


@dataclass
class Sample:
    """A picture or frames, a sound, or both to caption.

    Attributes:
        id: identifies the sample in the results. In a results file, it also stands for the media: if the media change,
            the sample needs another id.
        prompt: the question, without template or placeholders.
        image: RGB picture or list of frames, or a function that decodes it when its batch starts.
        audio: mono waveform (samples,) at 16 kHz in [-1, 1], or a function that decodes it.
        prefix: whether the learned prefix precedes the question. By default, the checkpoint decides: its
            `config.prefix_modalities` lists the modalities that it captions with the prefix.
    """

    id: str
    prompt: str
    image: Picture | Callable[[], Picture] | None = None
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
    """The result of a sample.

    Attributes:
        id: id of the sample.
        modality: modality of the sample.
        caption: the generated text, or None after an error.
        seconds: time for decoding the sample, and its share of the time of its batch.
        error: the error in one line, or None.
    """

    id: str
    modality: str
    caption: str | None
    seconds: float
    error: str | None = None


class CaptionRunner:
    """Captions samples with a model and its processor.

    Args:
        model: `LlavaAudioForConditionalGeneration`, or another model with `generate`.
        processor: the `LlavaAudioProcessor` of the model.
        batch_size: samples per forward pass. It affects the speed, not the captions, because padding is on the left.
        max_new_tokens: maximum length of a caption in tokens.
        num_beams: number of beams; 1 is greedy search. By default that of the model's generation configuration, or 1
            for sampling.
        temperature: temperature at which tokens are sampled from the whole vocabulary; 0 is greedy or beam search.
        seed: seed of the sampling. A sampled caption depends on the seed and the id of its sample, not on the batch.
        device: device to move the model to; by default, the model is not moved.
        dtype: dtype to convert the model to; by default, the model is not converted.

    Raises:
        ValueError: a count is below 1, or `temperature` is negative or combined with beams.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 64,
        num_beams: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_beams is None:
            configured = getattr(getattr(model, "generation_config", None), "num_beams", None)
            num_beams = 1 if temperature or configured is None else configured
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
        if temperature and num_beams > 1:
            raise ValueError(f"sampling uses one beam, not {num_beams}; set temperature to 0 or num_beams to 1")
        if device is not None or dtype is not None:  # `to` fails for a quantised or offloaded model
            model = model.to(device=device, dtype=dtype)
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        self.sampling = {"temperature": temperature, "seed": seed} if temperature else {}

    def run(
        self,
        samples: Iterable[Sample],
        out: str | os.PathLike | None = None,
        progress: bool = True,
        total: int | None = None,
    ) -> Iterator[CaptionResult]:
        """Caption samples in order. Each sample is decoded when its batch starts.

        Args:
            samples: any iterable; a generator is consumed one batch at a time.
            out: a JSON-lines file, to which each caption is appended immediately. A sample with the same id, weights
                and settings in the file is not captioned again. Errors are not saved, so a new run retries them.
            progress: whether to show a progress bar on stderr after two seconds, if stderr is a terminal.
            total: number of samples for the progress bar, if `samples` has no length.

        Yields:
            One `CaptionResult` per sample.

        Raises:
            ValueError: with `out`, an id appears twice or a line of the file is not a caption result.
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
        """Yield lists of saved results and new samples in order, with at most `batch_size` new samples per list."""
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
        """Yield the results for one list of `_batches`, in its order."""
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
        """Caption decoded samples in one batch, or one by one if the processor rejects the batch."""
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
        length = inputs["input_ids"].shape[1]
        options = dict(self.generation)
        if self.sampling:
            ids = [sample.id for sample, _, _ in decoded]
            sampling = IndependentSampling(ids, length, options["max_new_tokens"], **self.sampling)
            options["logits_processor"] = [sampling]
        if is_deepspeed_zero3_enabled() and not _is_partitioned(self.model):
            options["synced_gpus"] = False  # whole weights need no other rank, and ranks have other numbers of batches
        # `generate` disables gradients; inference mode would reject the weights of some quantisations.
        sequences = self.model.generate(**inputs, **options)
        texts = self.processor.batch_decode(sequences[:, length:], skip_special_tokens=True)
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
        images = [frames_of(image) for _, (image, _), _ in decoded]
        audio = [audio for _, (_, audio), _ in decoded if audio is not None]
        inputs = self.processor(
            text=text,
            images=images if any(images) else None,
            audio=audio or None,
            sampling_rate=SAMPLING_RATE,
            return_tensors="pt",
            padding=True,
        )
        inputs = inputs.to(execution_device(self.model))
        # The processor returns float32, but a tower in bfloat16 requires bfloat16.
        for name in ("pixel_values", "input_features"):
            if name in inputs:
                inputs[name] = inputs[name].to(self.model.dtype)
        return inputs

    def _settings(self) -> str:
        """The settings that captions depend on, besides the sample."""
        settings = [self.generation, self.processor.to_dict(), str(self.model.dtype), weights_digest(self.model)]
        if self.sampling:
            settings.append(self.sampling)
        return json.dumps(settings, sort_keys=True, default=str)


def frames_of(image: Picture | None) -> list[Image.Image]:
    """Return the frames of a picture, a clip or nothing as a list, which the processor takes for each text."""
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


def _is_partitioned(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the weights over the ranks."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def execution_device(model: torch.nn.Module) -> torch.device:
    """The device of a model's inputs, even if offloading has moved its weights to the meta device."""
    if model.device.type != "meta":
        return model.device
    return torch.device(getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu")


def weights_digest(model: torch.nn.Module, per_tensor: int = 64) -> str:
    """
    A hash that identifies the weights of a model.

    It covers the name, the shape and about `per_tensor` evenly spaced values of each tensor. It does not read the
    whole model (14 GB at full size), but a training step changes some of these values.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.device.type == "meta":
            tensor = load_offloaded_parameter(model, name)
        if hasattr(tensor, "dequantize") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            tensor = tensor.dequantize()  # packed tensors of torchao and quanto
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // per_tensor)].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def read_results(path: str | os.PathLike) -> list[CaptionResult]:
    """
    The results in a JSON-lines file of `CaptionRunner.run`, of any settings. An incomplete last line is ignored.

    Raises:
        ValueError: a line of the file is not a caption result.
    """
    return [result for _, result in _read_lines(Path(path))[0]]


def _read_lines(path: Path) -> tuple[list[tuple[str, CaptionResult]], int]:
    """Fingerprints and results in a results file, and the length in bytes of its complete lines."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:end].splitlines(), start=1):
        try:
            row = json.loads(line)
            lines.append((row.pop("fingerprint"), CaptionResult(**row)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _foreign(path, number) from error
    rest = content[end:]
    if not rest.startswith(LINE_START[: len(rest)]):
        raise _foreign(path, number=content.count(b"\n") + 1)
    return lines, end


def _foreign(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}: line {number} is not a caption result; use another file or delete this one")


class _ResultFile:
    """A JSON-lines file with the results of earlier runs, to which new results are appended."""

    def __init__(self, path: Path, settings: str):
        self.path = path
        self.settings = settings
        self.seen = set()
        self.results = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines, end = _read_lines(self.path)
        self.results = {(fingerprint, result.id): result for fingerprint, result in lines}
        if end < self.path.stat().st_size:  # a run was killed while it wrote its last line
            os.truncate(self.path, end)

    def _fingerprint(self, sample: Sample) -> str:
        parts = json.dumps([self.settings, sample.prompt, sample.modality, sample.prefix])
        return hashlib.sha256(parts.encode()).hexdigest()[:32]

    def find(self, sample: Sample) -> CaptionResult | None:
        if sample.id in self.seen:
            raise ValueError(f"sample id {sample.id!r} appears twice; {self.path} needs unique ids")
        self.seen.add(sample.id)
        return self.results.get((self._fingerprint(sample), sample.id))

    def append(self, sample: Sample, result: CaptionResult) -> None:
        line = json.dumps({**asdict(result), "fingerprint": self._fingerprint(sample)}, ensure_ascii=False) + "\n"
        # One unbuffered write per line, so an interrupted process can truncate only the last line.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())


def _decode(sample: Sample) -> tuple[Picture | None, np.ndarray | None]:
    image = sample.image() if callable(sample.image) else sample.image
    audio = sample.audio() if callable(sample.audio) else sample.audio
    return image, audio


def _failure(sample: Sample, seconds: float, error: Exception) -> CaptionResult:
    return CaptionResult(sample.id, sample.modality, None, seconds, " ".join(str(error).split()))
