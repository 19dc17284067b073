"""Metrics that need the true sources of a clip, which AVWorld provides."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dali_llava.processing.corpora.avworld import names
from dali_llava.processing.corpora.avworld.classes import CLASSES

from ..caption_metrics import Scored
from ..metrics.clip_scores import ClipScores
from ..metrics.phrases import asserting_share, contains_any, count_phrase, named_counts


SOURCE_METRICS = ("sound_recall", "sound_precision", "sound_f1", "seen_recall", "visual_bias")

Sources = Mapping[str, Sequence[str]]


def class_phrases() -> dict[str, tuple[str, ...]]:
    """Every sounding class of AVWorld -> phrases that name it."""
    return {name: names(name) for name in CLASSES}


def score_sources(
    candidates: Mapping[str, str], sounding: Sources, seen: Sources, classes: Mapping[str, Sequence[str]]
) -> Scored:
    """Computes the recall, precision and F1 of the sources that the captions name, over all sources of all clips.

    A caption names a class once for each time that it contains one of its phrases, so a class that is named twice
    costs precision, as one that does not sound.

    Args:
        candidates: clip id -> caption.
        sounding: clip id -> distinct classes that are audible.
        seen: clip id -> classes that sound, are visible, and look like no other class; empty for clips without any.
        classes: every class -> phrases that name it.

    Returns:
        sound_recall, sound_precision, sound_f1 and seen_recall: fractions in [0, 1], or None with a reason.

    Raises:
        ValueError: the sources of a clip are missing, a class is unknown, or a class has no phrase.
    """
    captions = list(candidates.values())
    counts = {}
    for name, sources in (("sound_recall", sounding), ("seen_recall", seen)):
        missing = [clip for clip in candidates if clip not in sources]
        if missing:
            raise ValueError(f"{len(missing)} clips have no list of sources for {name}, the first is {missing[0]}")
        unknown = [source for clip in candidates for source in sources[clip] if source not in classes]
        if unknown:
            raise ValueError(f"no phrases for the class {unknown[0]!r}; known: {', '.join(classes)}")
        counts[name] = named_counts(captions, [[classes[source] for source in sources[clip]] for clip in candidates])
    mentions = np.array(
        [
            sum(count_phrase(caption, phrase) for phrases in classes.values() for phrase in phrases)
            for caption in captions
        ]
    )
    named, sources = counts["sound_recall"].T
    clips = {
        "sound_recall": ClipScores(counts["sound_recall"]),
        "sound_precision": ClipScores(np.stack([named, mentions], -1)),
        "sound_f1": ClipScores(np.stack([2 * named, mentions + sources], -1)),
        "seen_recall": ClipScores(counts["seen_recall"]),
    }
    nothing = {name: "no clip has such a source" for name in clips} | {"sound_precision": "no caption names a source"}
    reasons = {name: nothing[name] for name, scores in clips.items() if np.isnan(scores.corpus)}
    metrics = {name: None if name in reasons else scores.corpus for name, scores in clips.items()}
    return Scored(metrics, reasons, {name: scores for name, scores in clips.items() if name not in reasons})


def visual_bias(answers: Sequence[str], visual_words: Sequence[str]) -> float:
    """Share of answers to "What can you see ?", from audio alone and without prefix, that contain a visual word.

    Raises:
        ValueError: there are no answers or no visual words.
    """
    return asserting_share(answers, visual_words)


def majority_source(captions: Sequence[str], names: Mapping[str, Sequence[str]]) -> str | None:
    """The source that most captions of a recording name; None if no caption names a source.

    Args:
        captions: captions of several crops of the recording.
        names: source -> phrases that name it. In a tie, the first source in `names` is returned, so the order must not
            depend on the recording.
    """
    votes = Counter(
        source for caption in captions for source, phrases in names.items() if contains_any(caption, phrases)
    )
    return max(names, key=lambda source: votes[source]) if votes else None
