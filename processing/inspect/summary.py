"""Statistics over all rows of a corpus in one pass, and random clips to show."""

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


MAX_BINS = 20  # maximum number of bins of the histogram
SHOWN_LABELS = 5  # labels in the table


@dataclass
class CorpusSummary:
    """
    Statistics of a corpus.

    Attributes:
        clips: number of clips.
        with_sound, with_frames, with_captions, with_labels: number of clips that list any.
        captions: number of captions.
        labels: number of clips by label.
        durations: known durations of clips in seconds.
        undated: number of clips of unknown duration, by reason.
        checked: number of clips with media that were opened.
        broken: number of clips with sound or frames that cannot be opened, by reason.
    """

    clips: int = 0
    with_sound: int = 0
    with_frames: int = 0
    with_captions: int = 0
    with_labels: int = 0
    captions: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    durations: array = field(default_factory=lambda: array("d"))  # eight bytes per clip
    undated: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    broken: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row. Its media are never decoded, and only probed if the row has no `end`."""
        self.clips += 1
        self.with_sound += is_given(row["audio"])
        self.with_frames += bool(row["frames"])
        self.with_captions += bool(row["captions"])
        self.with_labels += bool(row["labels"])
        self.captions += len(row["captions"])
        self.labels.update(dict.fromkeys(row["labels"], 1))  # a repeated label counts once per clip
        duration, reason = clip_duration(row)
        if reason is None:
            self.durations.append(duration)
        else:
            self.undated[reason] += 1

    def frequent_labels(self, count: int | None = None) -> list[tuple[str, int]]:
        """Return the most frequent labels (default: all) and their clip counts. Ties are in alphabetical order."""
        return sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))[:count]

    def histogram(self) -> list[tuple[float, float, int]]:
        """
        Return (start, end, clips) for each bin of the durations.

        There are up to `MAX_BINS` bins with round edges, or one bin if all durations are equal.
        """
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
        """Return the statistics for summary.json."""
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
        """Return the statistics as text: a name and a value per line."""
        figures = self.to_dict()
        times, lines = figures["durations"], [("clips", f"{self.clips:,}")]
        for what in ("sound", "frames", "captions", "labels"):
            count = figures[f"with_{what}"]
            lines.append((f"with {what}", f"{count:,} ({count / max(1, self.clips):.0%})"))
        lines.append(("captions in total", f"{self.captions:,}"))
        if self.durations:
            hours = times["total_hours"]
            ends = f"{times['min']:.2f} to {times['max']:.2f} s, median {times['median']:.2f} s"
            lines.append(("durations", f"{ends}; {f'{hours:,.2f}' if hours >= 1 else f'{hours:.3g}'} h in total"))
        if self.undated:
            lines.append(("unknown duration", _by_reason(self.undated)))
        shown = "; ".join(f"{label} {count:,}" for label, count in self.frequent_labels(SHOWN_LABELS))
        more = "; ..." if len(self.labels) > SHOWN_LABELS else ""
        lines.append(("distinct labels", f"{len(self.labels):,}" + (f": {shown}{more}" if shown else "")))
        lines.append(("cannot be opened", f"{_by_reason(self.broken)} of {self.checked:,} checked"))
        return lines


def inspect_rows(
    rows: Iterable[Mapping[str, Any]],
    samples: int = 10,
    check: int = 0,
    seed: int = 0,
    total: int | None = None,
) -> tuple[CorpusSummary, list[ClipSample]]:
    """
    Summarise a corpus in one pass, and open some of its clips.

    Args:
        rows: rows of a corpus, preferably streamed. Only the clips to open are kept in memory.
        samples: number of random clips to return, or all clips if there are fewer. With the same seed, a smaller
            number gives the first samples of a larger one.
        check: number of random clips to decode, including the samples; by default, only the samples.
        seed: seed of the random choice.
        total: number of rows for the progress bar, if `rows` has no length.

    Returns:
        The statistics and the samples.

    Raises:
        ValueError: if there are no rows, or `samples` is less than 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    summary, draw = CorpusSummary(), random.Random(seed)
    # The clips with the smallest random numbers are a uniform choice, without knowing the number of clips in advance.
    chosen = heapq.nsmallest(max(samples, check), _counted(rows, summary, total), key=lambda row: draw.random())
    if not chosen:
        raise ValueError("the corpus has no clips; check its options and its split")
    opened = []
    for row in tqdm(chosen, desc="opening", unit=" clips", delay=2, leave=False):
        sample = open_clip(row)
        summary.checked += bool(sample.files or sample.problems)  # a clip without media is not checked
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
    Return the duration of a clip in seconds from its row or the header of its file, and the reason if it is unknown.

    One of the two is None. Reasons: "no media"; "missing", the file does not exist; "broken", the file is not
    readable; "too_short", the file ends before the clip starts; "undeclared", the file is a picture or its header has
    no duration.
    """
    start, end = row["start"] or 0.0, row["end"]
    if end is not None:
        return end - start, None
    source = row["audio"] if is_given(row["audio"]) else next(iter(row["frames"]), None)
    if source is None:
        return None, "no media"
    if source["bytes"] is not None:
        start = 0.0  # bytes contain only the clip
    elif not Path(source["path"]).exists():
        return None, "missing"
    try:
        duration = probe(source).duration
    except Exception:  # decoders may raise anything on damaged files, and the run must continue
        return None, "broken"
    if duration is None:
        return None, "undeclared"
    return (duration - start, None) if duration > start else (None, "too_short")


def _by_reason(counts: Counter[str]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    return f"{counts.total():,}" + (f" ({reasons})" if reasons else "")
