"""Whole-word search for phrases in captions, shared by the metrics over sources and visual words."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache


_WORD = re.compile(r"[^\W_]+")


@lru_cache(maxsize=65536)
def _words(text: str) -> str:
    """Lower-case words with one blank around each: " a dog s bark "."""
    return " ".join(["", *_WORD.findall(text.lower()), ""])


@lru_cache(maxsize=65536)
def _forms(phrase: str) -> tuple[str, ...]:
    """The phrase's words and its regular plurals, each with blanks around."""
    words = _words(phrase)
    if not words.strip():
        raise ValueError(f"the phrase {phrase!r} has no word: remove it from the list")
    stem = words[:-1]
    plurals = [stem + "s ", stem + "es "]
    if stem.endswith("y"):
        plurals.append(stem[:-1] + "ies ")
    return (words, *plurals)


def contains_phrase(text: str, phrase: str) -> bool:
    """Whether ``text`` holds ``phrase`` as whole words, in order, in any case, the last word singular or plural."""
    words = _words(text)
    return any(form in words for form in _forms(phrase))


def contains_any(text: str, phrases: Iterable[str]) -> bool:
    """Whether ``text`` holds any of the phrases; see :func:`contains_phrase`."""
    return any(contains_phrase(text, phrase) for phrase in phrases)


def named_share(predictions: Sequence[str], sources: Sequence[Sequence[Sequence[str]]]) -> float | None:
    """Share of sources that the clip's prediction names by any of their phrases, over all sources of all clips.

    Args:
        predictions: one caption a clip.
        sources: for each clip, its sources; for each source, the phrases that name it.

    Returns:
        A fraction in [0, 1], or None where no clip has a source.

    Raises:
        ValueError: if the lengths differ, or a source has no phrase.
    """
    if len(predictions) != len(sources):
        raise ValueError(f"{len(predictions)} predictions but {len(sources)} lists of sources: give one each")
    named = total = 0
    for index, (prediction, clip_sources) in enumerate(zip(predictions, sources, strict=True)):
        for phrases in clip_sources:
            if not phrases or isinstance(phrases, str):
                raise ValueError(f"a source of clip {index} is {phrases!r}: give it a list of accepted phrases")
            named += contains_any(prediction, phrases)
            total += 1
    return named / total if total else None


def asserting_share(predictions: Sequence[str], visual_words: Sequence[str]) -> float:
    """Share of predictions that hold any of ``visual_words``; see :func:`contains_phrase`.

    Raises:
        ValueError: if there is no prediction or no visual word.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    if not visual_words or isinstance(visual_words, str):
        raise ValueError(f"visual_words is {visual_words!r}: give a list of at least one word")
    return sum(contains_any(prediction, visual_words) for prediction in predictions) / len(predictions)
