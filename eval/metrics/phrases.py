"""Whole-word search for phrases in captions, used by the metrics on sources and visual words."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np


_WORD = re.compile(r"[^\W_]+")


@lru_cache(maxsize=65536)
def _words(text: str) -> str:
    """The words in lower case, separated and surrounded by single spaces, such as " a dog s bark "."""
    return " ".join(["", *_WORD.findall(text.lower()), ""])


@lru_cache(maxsize=65536)
def _forms(phrase: str) -> tuple[re.Pattern, ...]:
    """Patterns of the words of the phrase and of its regular plurals, for the text of `_words`."""
    words = _words(phrase).strip()
    if not words:
        raise ValueError(f"the phrase {phrase!r} has no words: remove it from the list")
    forms = [words, words + "s", words + "es"]
    if words.endswith("y"):
        forms.append(words[:-1] + "ies")
    return tuple(re.compile(f"(?<= ){form}(?= )") for form in forms)


def count_phrase(text: str, phrase: str) -> int:
    """Count how often ``text`` contains ``phrase`` as consecutive whole words, ignoring case.

    The last word may be singular or plural. The more frequent of the two counts, because a plural may be a verb, as in
    "a cuckoo cuckoos".
    """
    words = _words(text)
    return max(len(form.findall(words)) for form in _forms(phrase))


def contains_phrase(text: str, phrase: str) -> bool:
    """Return True if ``text`` contains ``phrase``; see :func:`count_phrase`."""
    return count_phrase(text, phrase) > 0


def contains_any(text: str, phrases: Iterable[str]) -> bool:
    """Return True if ``text`` contains any of the phrases; see :func:`contains_phrase`."""
    return any(contains_phrase(text, phrase) for phrase in phrases)


def named_counts(predictions: Sequence[str], sources: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """Count the sources that the prediction of their clip names.

    Args:
        predictions: one caption per clip.
        sources: list of sources per clip, each given as the list of phrases that name it.

    Returns:
        (clips, 2) Named sources and all sources of each clip.

    Raises:
        ValueError: if the lengths differ or a source has no phrase.
    """
    if len(predictions) != len(sources):
        raise ValueError(
            f"{len(predictions)} predictions but {len(sources)} lists of sources: give one list per prediction"
        )
    counts = np.zeros((len(predictions), 2))
    for index, (prediction, clip_sources) in enumerate(zip(predictions, sources, strict=True)):
        for phrases in clip_sources:
            if not phrases or isinstance(phrases, str):
                raise ValueError(f"a source of clip {index} is {phrases!r}: give it a list of accepted phrases")
            counts[index] += contains_any(prediction, phrases), 1
    return counts


def named_share(predictions: Sequence[str], sources: Sequence[Sequence[Sequence[str]]]) -> float | None:
    """Share of sources that the prediction of their clip names, over all sources of all clips.

    Returns:
        A fraction in [0, 1], or None if no clip has a source.

    Raises:
        ValueError: see :func:`named_counts`.
    """
    named, total = named_counts(predictions, sources).sum(0)
    return float(named / total) if total else None


def asserting_share(predictions: Sequence[str], visual_words: Sequence[str]) -> float:
    """Share of predictions that contain any of ``visual_words``; see :func:`contains_phrase`.

    Raises:
        ValueError: if there are no predictions or no visual words.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    if not visual_words or isinstance(visual_words, str):
        raise ValueError(f"visual_words is {visual_words!r}: give a list of at least one word")
    return sum(contains_any(prediction, visual_words) for prediction in predictions) / len(predictions)
