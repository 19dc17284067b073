"""A corpus of another package: tones beside pictures of one colour."""

import io
import wave
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image

from dali_llava.processing.corpora import register_corpus
from dali_llava.processing.corpora.builder import FEATURES
from dali_llava.processing.corpora.options import option


@dataclass
class TonesConfig(datasets.BuilderConfig):
    splits: tuple[str, ...] = ("train",)
    size: int = option("number of clips", default=8)


class Tones(datasets.GeneratorBasedBuilder):
    BUILDER_CONFIG_CLASS = TonesConfig

    def _info(self):
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator("train", {"indices": list(range(self.config.size))})]

    def _generate_examples(self, indices):
        for index in indices:
            media = {"audio": {"path": "tone.wav", "bytes": tone(200 + 50 * index)}, "frames": [picture(20 * index)]}
            texts = {"captions": ["a tone"], "labels": ["tone"], "source": "tones"}
            yield index, {"id": str(index), "start": 0.0, "end": 1.0} | media | texts


def tone(pitch: float) -> bytes:
    samples = 0.5 * np.sin(2 * np.pi * pitch * np.arange(16_000) / 16_000)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", ""))
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def picture(red: int) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), (red, 90, 90)).save(file, "png")
    return {"path": "picture.png", "bytes": file.getvalue()}


register_corpus("tones", Tones)
