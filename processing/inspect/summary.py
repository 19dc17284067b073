"""What is in a corpus: figures over all its rows, in one pass, and some random clips, opened."""

import heapq
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from dali_llava.processing.inspect.clip_page import ClipSample, open_clip
from dali_llava.processing.media import probe
from dali_llava.processing.shards.clip import is_given


MAX_BINS = 20  # of the histogram
SHOWN_LABELS = 5  # in the table


@dataclass
class CorpusSummary:
    """The figures of a corpus.

    clips: all; with_sound, with_frames, with_captions, with_labels: those that list any; captions: of all clips;
    labels: label -> clips; durations: of clips where they are known, in seconds; undated: reason -> clips where they
    are not. checked: clips with media that were opened; broken: reason -> those whose sound or frames could not be.
    """

    clips: int = 0
    with_sound: int = 0
    with_frames: int = 0
    with_captions: int = 0
    with_labels: int = 0
    captions: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    durations: array = field(default_factory=lambda: array("d"))  # eight bytes are all that a clip leaves in memory
    undated: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    broken: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row; its media are decoded in no case, and probed only where the row has no `end`."""
        self.clips += 1
        self.with_sound += is_given(row["audio"])
        self.with_frames += bool(row["frames"])
        self.with_captions += bool(row["captions"])
        self.with_labels += bool(row["labels"])
        self.captions += len(row["captions"])
        self.labels.update(dict.fromkeys(row["labels"], 1))  # a label that a row has twice is one clip's
        duration, reason = clip_duration(row)
        if reason is None:
            self.durations.append(duration)
        else:
            self.undated[reason] += 1

    def frequent_labels(self, count: int | None = None) -> list[tuple[str, int]]:
        """The most frequent labels with their clips, alphabetically among equals; all by default."""
        return sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))[:count]

    def histogram(self) -> list[tuple[float, float, int]]:
        """(from, to, clips) of durations, in up to `MAX_BINS` bins between round numbers; one where all are equal."""
        if not self.durations:
            return []
        low, high = min(self.durations), max(self.durations)
        if high - low < 1e-3:
            return [(low, high, len(self.durations))]
        edges = MaxNLocator(MAX_BINS, steps=[1, 2, 5, 10]).tick_values(low, high)
        counts = np.histogram(self.durations, edges)[0]
        return [
            (round(float(start), 6), round(float(stop), 6), int(count))
            for start, stop, count in zip(edges, edges[1:], counts, strict=False)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The object of summary.json."""
        known = np.asarray(self.durations)
        ends = [float(of(known)) if len(known) else None for of in (np.min, np.median, np.max)]
        counts = ("clips", "with_sound", "with_frames", "with_captions", "with_labels", "captions")
        return {
            **{name: getattr(self, name) for name in counts},
            "durations": {
                "known": len(known),
                **dict(zip(("min", "median", "max"), ends, strict=True)),
                "total_hours": float(known.sum()) / 3600,
                "histogram": self.histogram(),
                "unknown": dict(self.undated.most_common()),
            },
            "distinct_labels": len(self.labels),
            "labels": dict(self.frequent_labels()),
            "checked": self.checked,
            "broken": dict(self.broken.most_common()),
        }

    def table(self) -> list[tuple[str, str]]:
        """The figures in words, as a name and a value a line."""
        figures = self.to_dict()
        times, lines = figures["durations"], [("clips", f"{self.clips:,}")]
        for what in ("sound", "frames", "captions", "labels"):
            count = figures[f"with_{what}"]
            lines.append((f"with {what}", f"{count:,} ({count / max(1, self.clips):.0%})"))
        lines.append(("captions in all", f"{self.captions:,}"))
        if self.durations:
            hours = times["total_hours"]
            ends = f"{times['min']:.2f} to {times['max']:.2f} s, median {times['median']:.2f} s"
            lines.append(("durations", f"{ends}; {f'{hours:,.2f}' if hours >= 1 else f'{hours:.3g}'} h in all"))
        if self.undated:
            lines.append(("of unknown duration", _by_reason(self.undated)))
        shown = "; ".join(f"{label} {count:,}" for label, count in self.frequent_labels(SHOWN_LABELS))
        more = "; ..." if len(self.labels) > SHOWN_LABELS else ""
        lines.append(("distinct labels", f"{len(self.labels):,}" + (f": {shown}{more}" if shown else "")))
        lines.append(("cannot be opened", f"{_by_reason(self.broken)} of {self.checked:,} looked at"))
        return lines


def inspect_rows(
    rows: Iterable[Mapping[str, Any]],
    samples: int = 10,
    check: int = 0,
    seed: int = 0,
    total: int | None = None,
) -> tuple[CorpusSummary, list[ClipSample]]:
    """
    Go through a corpus once, and open some of its clips.

    Args:
        rows: of a corpus, best streamed: none is kept but the clips to open.
        samples: random clips to give back, or all where there are fewer; fewer samples of a seed are the first of
            more.
        check: random clips to decode, the samples among them; no more than these by default.
        seed: of the choice.
        total: number of rows, for the progress bar, where `rows` cannot tell.

    Raises:
        ValueError: no rows, or a number outside its range.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    summary, draw = CorpusSummary(), random.Random(seed)
    # The clips with the smallest of random numbers are a fair choice, though nobody knows how many will come.
    chosen = heapq.nsmallest(max(samples, check), _counted(rows, summary, total), key=lambda row: draw.random())
    if not chosen:
        raise ValueError("the corpus has no clips; check its options and its split")
    opened = []
    for row in tqdm(chosen, desc="opening", unit=" clips", delay=2, leave=False):
        sample = open_clip(row)
        summary.checked += bool(sample.files or sample.problems)  # a clip without media has nothing to open
        if sample.problems:
            summary.broken[sample.problems[0].reason] += 1
        if len(opened) < samples:
            opened.append(sample)
    return summary, opened


def _counted(rows: Iterable[Mapping], summary: CorpusSummary, total: int | None) -> Iterator[Mapping]:
    for row in tqdm(rows, desc="reading", unit=" clips", total=total, delay=2, leave=False):
        summary.add(row)
        yield row


def clip_duration(row: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """
    Seconds of a clip by its row, else by the header of its file, and None; or None and the reason why nothing tells.

    Reasons: "no media"; "missing", no such file; "broken", an unreadable one; "too_short", it ends before the clip
    starts; "undeclared": a picture, or a file whose header does not tell.
    """
    start, end = row["start"] or 0.0, row["end"]
    if end is not None:
        return end - start, None
    source = row["audio"] if is_given(row["audio"]) else next(iter(row["frames"]), None)
    if source is None:
        return None, "no media"
    if source["bytes"] is not None:
        start = 0.0  # bytes hold the clip alone
    elif not Path(source["path"]).exists():
        return None, "missing"
    try:
        duration = probe(source).duration
    except Exception:  # what media files do to decoders cannot be listed, and the other clips must go on
        return None, "broken"
    if duration is None:
        return None, "undeclared"
    return (duration - start, None) if duration > start else (None, "too_short")


def _by_reason(counts: Counter[str]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    return f"{counts.total():,}" + (f" ({reasons})" if reasons else "")
