"""All caption metrics, for one or several systems with the same references."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .metrics.clip_scores import ClipScores
from .metrics.corpus_scores import bleu, cider_d, rouge_l, spider, vocabulary
from .metrics.meteor_process import MeteorScorer
from .metrics.sentence_models import FLUENCY_MODEL, SENTENCE_MODEL, FluencyDetector, SentenceEncoder, penalize
from .metrics.spice_process import find_corenlp, require_programs, spice
from .metrics.tokenization import JAVA_MISSING, PYTHON, find_java, tokenize


CAPTION_METRICS = ("bleu_1", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider")
FURTHER_METRICS = ("spider_fl", "fense", "sbert_sim", "vocabulary")  # on request
PYTHON_TOKENIZER_REASON = (
    f"captions were tokenized by the built-in Python tokenizer, because PTB {JAVA_MISSING}; scores on its tokens are "
    "close to scores on PTB tokens, but not equal"
)

Metrics = dict[str, float | None]
Reasons = dict[str, str]


@dataclass
class Scored:
    """
    The scores of a system.

    Attributes:
        metrics: scores of the corpus by name: fractions in [0, 1], CIDEr-D in [0, 10], or None.
        reasons: a reason for each None, and "tokenizer" if the tokens are not PTB's.
        clips: statistics of each clip, in the order of the references, for the metrics that have them.
    """

    metrics: Metrics
    reasons: Reasons
    clips: dict[str, ClipScores]

    def __or__(self, other: "Scored") -> "Scored":
        """The scores of the same clips by further metrics."""
        return Scored(self.metrics | other.metrics, self.reasons | other.reasons, self.clips | other.clips)


def check_ids(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], system: str = "") -> None:
    """Checks that candidates and references are for the same clips.

    Raises:
        ValueError: clips have no candidate, no references or blank references (the message contains their number and
            the first ids), or there are no clips.
    """
    of = f" of {system}" if system else ""
    if not references:
        raise ValueError("no references to score against")
    _reject([i for i in references if i not in candidates], f"references without a candidate{of}", "caption these too")
    _reject([i for i in candidates if i not in references], f"candidates{of} without a reference", "remove them")
    texts = [i for i, caption in candidates.items() if not isinstance(caption, str)]
    _reject(texts, f"candidates{of} that are not text", "give one string per clip")
    lists = [i for i, captions in references.items() if isinstance(captions, str) or not captions]
    _reject(lists, "references that are not a list of captions", "give a list of at least one string per clip")
    blank = [i for i, captions in references.items() if not all(str(caption).strip() for caption in captions)]
    _reject(blank, "references with a blank caption", "remove the blank ones")


def _reject(ids: Sequence[str], what: str, remedy: str) -> None:
    if ids:
        shown = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
        raise ValueError(f"{len(ids)} {what}: {shown}; {remedy}")


class CaptionScorer:
    """Scores systems with the caption metrics.

    The constructor starts METEOR's Java process, which is ready after about 8 s, and does not wait for it. Construct
    the scorer before other work. Close it, or use it as a context manager.

    Args:
        java: path of the Java launcher, "auto" (PATH), or None to run without Java. Without Java, METEOR is None and a
            Python tokenizer replaces PTB.
        corenlp: folder of Stanford CoreNLP 3.6.0, for SPICE; see
            :func:`dali_llava.eval.metrics.spice_process.find_corenlp`.
        metrics: names from ``CAPTION_METRICS`` and ``FURTHER_METRICS``.
        sentence_model: folder or Hub id of a model of `sentence-transformers`, for sbert_sim and FENSE.
        fluency_model: path or name of FENSE's detector of fluency errors, for FENSE and SPIDEr-FL.

    Attributes:
        tokenizer: "ptb" or "python"; None before the first call of a scoring method.

    Raises:
        FileNotFoundError: ``corenlp`` does not contain CoreNLP 3.6.0.
        ValueError: a metric is unknown.
    """

    def __init__(
        self,
        java: str | None = "auto",
        corenlp: str | os.PathLike | None = None,
        metrics: Sequence[str] = CAPTION_METRICS,
        sentence_model: str = SENTENCE_MODEL,
        fluency_model: str = FLUENCY_MODEL,
    ):
        known = (*CAPTION_METRICS, *FURTHER_METRICS)
        unknown = [name for name in metrics if name not in known]
        if unknown:
            raise ValueError(f"unknown metric {unknown[0]!r}: choose from {', '.join(known)}")
        self.tokenizer: str | None = None
        self.metrics = tuple(name for name in known if name in metrics)
        self.corenlp: Path | None = find_corenlp(corenlp)
        self.java = find_java(java)
        self.meteor = MeteorScorer(self.java) if self.java and "meteor" in metrics else None
        self._models = {"sentences": (SentenceEncoder, sentence_model), "fluency": (FluencyDetector, fluency_model)}
        self._loaded: dict[str, SentenceEncoder | FluencyDetector | RuntimeError] = {}

    def __enter__(self) -> "CaptionScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops METEOR's Java process."""
        if self.meteor is not None:
            self.meteor.close()

    def model(self, kind: str) -> SentenceEncoder | FluencyDetector:
        """The model of "sentences" or "fluency", loaded once.

        Raises:
            RuntimeError: the model or its package is missing.
        """
        if kind not in self._loaded:
            load, name = self._models[kind]
            try:
                self._loaded[kind] = load(name)
            except RuntimeError as error:
                self._loaded[kind] = error
        if isinstance(self._loaded[kind], RuntimeError):
            raise self._loaded[kind]
        return self._loaded[kind]

    def score(self, candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scored:
        """Scores one system; see :meth:`score_many`."""
        return self.score_many({"": candidates}, references)[""]

    def score_many(
        self,
        systems: Mapping[str, Mapping[str, str]],
        references: Mapping[str, Sequence[str]],
        progress: bool = False,
    ) -> dict[str, Scored]:
        """Scores several systems with the same references. All captions are tokenized in one run.

        Args:
            systems: name -> candidates, which map a clip id to its caption.
            references: clip id -> captions, all of which count.
            progress: whether to show a progress bar on stderr.

        Returns:
            The scores by name of the system.

        Raises:
            ValueError: a system and the references are for different clips.
        """
        for name, candidates in systems.items():
            check_ids(candidates, references, name)
        ids = list(references)
        texts = [caption for i in ids for caption in references[i]]
        texts += [candidates[i] for candidates in systems.values() for i in ids]
        tokens, self.tokenizer = tokenize(texts, java=self.java)
        rest = iter(tokens)
        tokenized_references = [[next(rest) for _ in references[i]] for i in ids]
        runs = {
            name: _Run(
                self,
                [candidates[i] for i in ids],
                [list(references[i]) for i in ids],
                [next(rest) for _ in ids],
                tokenized_references,
            )
            for name, candidates in systems.items()
        }
        # METEOR is last, because its process starts while the other metrics run.
        steps = [(metric, run) for metric in sorted(self.metrics, key="meteor".__eq__) for run in runs.values()]
        for metric, run in tqdm(steps, desc="scoring captions", unit="step", leave=False, disable=not progress):
            run.compute(metric)
        return {name: run.result() for name, run in runs.items()}


class _Run:
    """The metrics of one system. Each is a property with its name, computed once."""

    def __init__(self, scorer: CaptionScorer, captions, references, predictions, tokenized_references):
        self.scorer = scorer
        self.captions: list[str] = captions
        self.references: list[list[str]] = references
        self.tokenized: tuple[list[str], list[list[str]]] = (predictions, tokenized_references)
        self.clips: dict[str, ClipScores] = {}
        self.metrics: Metrics = {}
        self.reasons: Reasons = {}

    def compute(self, name: str) -> ClipScores | None:
        """Compute a metric, or set None and the reason if it cannot be computed for these captions or here."""
        if name not in self.metrics:
            try:
                found = getattr(self, name)
                self.metrics[name] = found.corpus if isinstance(found, ClipScores) else float(found)
                if isinstance(found, ClipScores):
                    self.clips[name] = found
            except (RuntimeError, ValueError, OSError) as error:
                self.metrics[name], self.reasons[name] = None, str(error)
        return self.clips.get(name)

    def result(self) -> Scored:
        if self.scorer.tokenizer == PYTHON:
            self.reasons["tokenizer"] = PYTHON_TOKENIZER_REASON
        names = self.scorer.metrics
        clips = {name: self.clips[name] for name in names if name in self.clips}
        return Scored({name: self.metrics[name] for name in names}, self.reasons, clips)

    def _parts(self, what: str, *names: str) -> list[ClipScores]:
        parts = [self.compute(name) for name in names]
        missing = [name for name, part in zip(names, parts, strict=True) if part is None]
        if missing:
            raise RuntimeError(f"{what}: see {' and '.join(missing)}")
        return parts

    @cached_property
    def _bleu(self) -> dict[str, ClipScores]:
        return bleu(*self.tokenized)

    @property
    def bleu_1(self) -> ClipScores:
        return self._bleu["bleu_1"]

    @property
    def bleu_4(self) -> ClipScores:
        return self._bleu["bleu_4"]

    @property
    def rouge_l(self) -> ClipScores:
        return rouge_l(*self.tokenized)

    @property
    def cider_d(self) -> ClipScores:
        return cider_d(*self.tokenized)

    @property
    def meteor(self) -> ClipScores:
        if self.scorer.meteor is None:
            raise RuntimeError(JAVA_MISSING)
        return self.scorer.meteor.score(*self.tokenized)

    @property
    def spice(self) -> ClipScores:
        return spice(*self.tokenized, *require_programs(self.scorer.java, self.scorer.corenlp))

    @property
    def spider(self) -> ClipScores:
        return spider(*self._parts("is the mean of CIDEr-D and SPICE", "cider_d", "spice"))

    @property
    def sbert_sim(self) -> ClipScores:
        return self.scorer.model("sentences").similarity(self.captions, self.references)

    @cached_property
    def _fluency_errors(self) -> np.ndarray:
        return self.scorer.model("fluency").errors(self.captions)

    @property
    def fense(self) -> ClipScores:
        (similarity,) = self._parts("is sbert_sim with a penalty for fluency errors", "sbert_sim")
        return penalize(similarity, self._fluency_errors)

    @property
    def spider_fl(self) -> ClipScores:
        (spider,) = self._parts("is SPIDEr with a penalty for fluency errors", "spider")
        return penalize(spider, self._fluency_errors)

    @property
    def vocabulary(self) -> int:
        return vocabulary(self.tokenized[0])


def score_captions(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], **options) -> Scored:
    """Scores one system: clip id -> caption, with references clip id -> captions.

    Args:
        candidates, references: captions of the same clips.
        options: arguments of :class:`CaptionScorer`.

    Raises:
        ValueError: candidates and references are for different clips.
        FileNotFoundError: ``corenlp`` does not contain CoreNLP 3.6.0.
    """
    check_ids(candidates, references)
    with CaptionScorer(**options) as scorer:
        return scorer.score(candidates, references)
