"""Sentence similarity and fluency of captions, with pretrained models: the parts of FENSE (Zhou et al. 2022).

The models need the extra `metrics`: `sentence-transformers` embeds sentences, and `aac-metrics` has the detector of
fluency errors.
"""

import contextlib
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .clip_scores import ClipScores


SENTENCE_MODEL = "sentence-transformers/paraphrase-TinyBERT-L6-v2"
FLUENCY_MODEL = "echecker_clotho_audiocaps_base"
FLUENCY_PENALTY = 0.9  # share of the score that a fluency error costs
EXTRA_MISSING = "needs {}: run pip install 'dali-llava[metrics]'"
BATCH_SIZE = 32


@contextlib.contextmanager
def _loading(what: str, name: str, package: str, remedy: str):
    """Turn errors of loading a model into one that says what is missing."""
    try:
        yield
    except ImportError as error:
        raise RuntimeError(EXTRA_MISSING.format(package)) from error
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise RuntimeError(f"needs the {what} {name} ({cause}); {remedy}") from error


def _folder_of(name: str) -> str:
    """The folder of a model: `name` itself, or a snapshot from the cache of the Hub or else from the Hub."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # First without the network: where it is down, loading by name waits through minutes of retries.
        return snapshot_download(name, local_files_only=True)
    except LocalEntryNotFoundError:
        return snapshot_download(name, ignore_patterns=["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack"])


class SentenceEncoder:
    """
    Sentence-BERT (Reimers & Gurevych 2019).

    Args:
        name: folder or Hub id of a model of `sentence-transformers`. The default is the model of FENSE.

    Raises:
        RuntimeError: the package or the model is missing.
    """

    def __init__(self, name: str = SENTENCE_MODEL):
        with _loading(
            "sentence model", name, "sentence-transformers", "give its folder or Hub id as --sentence-model"
        ):
            from sentence_transformers import SentenceTransformer

            self.model = SentenceTransformer(_folder_of(name))

    def similarity(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> ClipScores:
        """Mean cosine similarity of each caption and its references; the captions are not tokenized."""
        texts = list(dict.fromkeys([*predictions, *(caption for captions in references for caption in captions)]))
        vectors = self.model.encode(
            texts, batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False
        ).astype(np.float64)
        row = {text: index for index, text in enumerate(texts)}
        return ClipScores.mean(
            [
                (vectors[[row[caption] for caption in captions]] @ vectors[row[prediction]]).mean()
                for prediction, captions in zip(predictions, references, strict=True)
            ]
        )


class FluencyDetector:
    """
    The detector of fluency errors of FENSE, with the implementation of `aac-metrics`.

    Args:
        name: the path of a checkpoint `*.ckpt` of the detector, or the name of a published one, which `aac-metrics`
            takes from its cache or downloads.

    Raises:
        RuntimeError: the package or the model is missing.
    """

    def __init__(self, name: str = FLUENCY_MODEL):
        remedy = "run aac-metrics-download, or give its path as --fluency-model"
        with _loading("fluency model", name, "aac-metrics", remedy):
            import torch
            from aac_metrics.functional.fer import BERTFlatClassifier, _load_echecker_and_tokenizer, fer
            from transformers import AutoTokenizer

            self._fer = fer
            if Path(name).suffix == ".ckpt":
                content = torch.load(name, map_location="cpu", weights_only=True)
                self.model = BERTFlatClassifier(content["model_type"], content["num_classes"])
                # Older versions of transformers saved this buffer.
                content["state_dict"].pop("encoder.embeddings.position_ids", None)
                self.model.load_state_dict(content["state_dict"])
                self.model.eval().requires_grad_(False)
                self.tokenizer = AutoTokenizer.from_pretrained(content["model_type"])
            else:
                self.model, self.tokenizer = _load_echecker_and_tokenizer(name, device="cpu")

    def errors(self, predictions: Sequence[str]) -> np.ndarray:
        """(clips,) 1.0 for each caption with a fluency error, otherwise 0.0."""
        _, scores = self._fer(list(predictions), True, self.model, self.tokenizer, device="cpu", batch_size=BATCH_SIZE)
        return scores["fer"].numpy()


def penalize(scores: ClipScores, errors: np.ndarray) -> ClipScores:
    """The mean of scores, of which a caption with a fluency error loses 90%."""
    return ClipScores.mean(scores.clips * (1 - FLUENCY_PENALTY * errors))
