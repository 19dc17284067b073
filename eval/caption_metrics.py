"""All caption metrics, for one or several systems with the same references."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from .metrics.corpus_scores import cider_d, corpus_bleu, rouge_l
from .metrics.meteor_process import MeteorScorer
from .metrics.tokenization import JAVA_MISSING, PYTHON, find_java, tokenize
from .spice import CORENLP_MISSING, find_corenlp, spice


CAPTION_METRICS = ("bleu_1", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider")
PYTHON_TOKENIZER_REASON = (
    f"captions were tokenized by the built-in Python tokenizer, because PTB {JAVA_MISSING}; scores on its tokens are "
    "close to scores on PTB tokens, but not equal"
)

Metrics = dict[str, float | None]
Reasons = dict[str, str]


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
    """Scores systems with BLEU-1, BLEU-4, METEOR, ROUGE-L and CIDEr-D, and with SPICE and SPIDEr if CoreNLP is found.

    The constructor starts METEOR's Java process, which is ready after about 8 s, and does not wait for it. Construct
    the scorer before other work. Close it, or use it as a context manager.

    Args:
        java: path of the Java launcher, "auto" (PATH), or None to run without Java. Without Java, METEOR is None and a
            Python tokenizer replaces PTB.
        corenlp: folder of Stanford CoreNLP 3.6.0, for SPICE; see :func:`dali_llava.eval.spice.find_corenlp`.

    Attributes:
        tokenizer: "ptb" or "python"; None before the first call of a scoring method.

    Raises:
        FileNotFoundError: ``corenlp`` does not contain CoreNLP 3.6.0.
    """

    def __init__(self, java: str | None = "auto", corenlp: str | os.PathLike | None = None):
        self.tokenizer: str | None = None
        self._corenlp: Path | None = find_corenlp(corenlp)
        self._java = find_java(java)
        self._meteor = MeteorScorer(self._java) if self._java else None

    def __enter__(self) -> "CaptionScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops METEOR's Java process."""
        if self._meteor is not None:
            self._meteor.close()

    def score(self, candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> tuple[Metrics, Reasons]:
        """Scores one system; see :meth:`score_many`."""
        return self.score_many({"": candidates}, references)[""]

    def score_many(
        self,
        systems: Mapping[str, Mapping[str, str]],
        references: Mapping[str, Sequence[str]],
        progress: bool = False,
    ) -> dict[str, tuple[Metrics, Reasons]]:
        """Scores systems with the same references. All captions are tokenized in one run.

        Args:
            systems: for each system, clip id -> caption. A blank caption scores 0.
            references: clip id -> reference captions. All references are used.
            progress: whether to show a progress bar on stderr.

        Returns:
            For each system, the metrics, with None for a metric that did not run, and the reasons: one for each None,
            and "tokenizer" if the Python tokenizer was used in place of PTB. CIDEr-D is in [0, 10], SPIDEr in
            [0, 5.5], the others in [0, 1].

        Raises:
            ValueError: the clips of a system differ from those of the references; see :func:`check_ids`.
        """
        for name, candidates in systems.items():
            check_ids(candidates, references, name)
        ids = list(references)
        texts = [caption for i in ids for caption in references[i]]
        texts += [candidates[i] for candidates in systems.values() for i in ids]
        tokens, self.tokenizer = tokenize(texts, java=self._java)
        rest = iter(tokens)
        tokenized_references = [[next(rest) for _ in references[i]] for i in ids]
        tokenized = {name: [next(rest) for _ in ids] for name in systems}
        results: dict[str, tuple[Metrics, Reasons]] = {name: ({}, {}) for name in systems}
        # METEOR is last, because its process starts while the other metrics run.
        steps = [(name, step) for step in (self._n_gram_metrics, self._spice, self._meteor_score) for name in systems]
        for name, step in tqdm(steps, desc="scoring captions", unit="step", leave=False, disable=not progress):
            step(tokenized[name], tokenized_references, *results[name])
        return {name: self._finish(*result) for name, result in results.items()}

    def _n_gram_metrics(self, predictions: list[str], references: list[list[str]], metrics: Metrics, reasons: Reasons):
        bleu = corpus_bleu(predictions, references)
        metrics |= {"bleu_1": bleu[0], "bleu_4": bleu[3], "rouge_l": rouge_l(predictions, references)}
        _try("cider_d", lambda: cider_d(predictions, references), metrics, reasons)

    def _spice(self, predictions: list[str], references: list[list[str]], metrics: Metrics, reasons: Reasons) -> None:
        if self._java is None or self._corenlp is None:
            needs = CORENLP_MISSING if self._java else f"{JAVA_MISSING}; also {CORENLP_MISSING}"
            metrics["spice"], reasons["spice"] = None, needs
            return
        _try("spice", lambda: spice(predictions, references, self._java, self._corenlp), metrics, reasons)

    def _meteor_score(self, predictions: list[str], references: list[list[str]], metrics: Metrics, reasons: Reasons):
        if self._meteor is None:
            metrics["meteor"], reasons["meteor"] = None, JAVA_MISSING
            return
        _try("meteor", lambda: self._meteor.score(predictions, references), metrics, reasons)

    def _finish(self, metrics: Metrics, reasons: Reasons) -> tuple[Metrics, Reasons]:
        parts = [name for name in ("cider_d", "spice") if metrics[name] is None]
        metrics["spider"] = None if parts else (metrics["cider_d"] + metrics["spice"]) / 2
        if parts:
            reasons["spider"] = "is the mean of CIDEr-D and SPICE: see " + " and ".join(parts)
        if self.tokenizer == PYTHON:
            reasons["tokenizer"] = PYTHON_TOKENIZER_REASON
        return {name: metrics[name] for name in CAPTION_METRICS}, reasons


def _try(name: str, compute: Callable[[], float], metrics: Metrics, reasons: Reasons) -> None:
    """Sets the metric, or None and the reason if it cannot be computed for these captions on this machine."""
    try:
        value = compute()
        if not math.isfinite(value):
            raise RuntimeError(f"gave {value}")
        metrics[name] = value
    except (RuntimeError, ValueError, OSError) as error:
        metrics[name], reasons[name] = None, str(error)


def score_captions(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    java: str | None = "auto",
    corenlp: str | os.PathLike | None = None,
) -> tuple[Metrics, Reasons]:
    """Scores one system: clip id -> caption, with references clip id -> captions.

    Returns:
        Metrics and reasons; see :meth:`CaptionScorer.score_many`.

    Raises:
        ValueError: candidates and references are for different clips.
        FileNotFoundError: ``corenlp`` does not contain CoreNLP 3.6.0.
    """
    return score_many({"": candidates}, references, java, corenlp)[""]


def score_many(
    systems: Mapping[str, Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    java: str | None = "auto",
    corenlp: str | os.PathLike | None = None,
    progress: bool = False,
) -> dict[str, tuple[Metrics, Reasons]]:
    """Scores systems with the same references; see :meth:`CaptionScorer.score_many`."""
    for name, candidates in systems.items():
        check_ids(candidates, references, name)
    with CaptionScorer(java, corenlp) as scorer:
        return scorer.score_many(systems, references, progress)
