"""Metrics that need the true sources of a clip, which AVWorld provides: sound_recall, seen_recall and visual_bias."""

from collections import Counter
from collections.abc import Mapping, Sequence

from ..metrics.phrases import asserting_share, contains_any, named_share


SOURCE_METRICS = ("sound_recall", "seen_recall", "visual_bias")

Sources = Sequence[Sequence[str]]


def score_sources(
    candidates: Mapping[str, str],
    sounding: Mapping[str, Sources],
    seen: Mapping[str, Sources] | None = None,
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Computes the shares of sources that the captions name.

    Args:
        candidates: clip id -> caption.
        sounding: clip id -> audible sources, each as a list of phrases that name it.
        seen: clip id -> sources that sound, are visible, and look like no other class; empty for clips without any.
            None if they are unknown.

    Returns:
        The metrics sound_recall and seen_recall (fractions, or None), and a reason for each None.

    Raises:
        ValueError: the sources of a clip are missing, or a source has no phrase.
    """
    metrics: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name, sources in (("sound_recall", sounding), ("seen_recall", seen)):
        if sources is None:
            metrics[name], reasons[name] = None, "the seen sources of these clips are unknown"
            continue
        missing = [clip for clip in candidates if clip not in sources]
        if missing:
            raise ValueError(f"{len(missing)} clips have no list of sources for {name}, the first is {missing[0]}")
        metrics[name] = named_share(list(candidates.values()), [sources[clip] for clip in candidates])
        if metrics[name] is None:
            reasons[name] = "no clip has such a source"
    return metrics, reasons


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
