"""Evaluating a captioner on a split of a corpus: systems, captions and scores."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset

from dali_llava.eval.avworld.source_metrics import score_sources
from dali_llava.processing.corpora.rows import open_audio, open_clip_frames

from .caption_metrics import CaptionScorer
from .results import Row
from .runner import CaptionRunner, Sample


@dataclass(frozen=True)
class System:
    """
    A captioner with a prompt and a modality: one row of the table.

    Args:
        method: objective of the alignment, or another name such as `image_only`.
        stage: `prompt`, `prefix`, `aligned`, `distilled` or `supervised`.
        modality: `audio`, `image` or `audiovisual`.
        prompt: the question.
        prefix: whether the learned prefix precedes the question; by default, the checkpoint decides, as in `Sample`.
    """

    method: str
    stage: str
    modality: str
    prompt: str
    prefix: bool | None = None

    @property
    def name(self) -> str:
        """Name of the system in file names, such as `mmd-aligned-audio`."""
        return f"{self.method}-{self.stage}-{self.modality}"


@dataclass
class Captioned:
    """
    Captions of a split by one system.

    Attributes:
        system, split: the system and the split.
        captions: clip id -> caption.
        failures: clip id -> error, for clips without a caption.
    """

    system: System
    split: str
    captions: dict[str, str]
    failures: dict[str, str] = field(default_factory=dict)


def split_samples(rows: Dataset, system: System, processor) -> Iterator[Sample]:
    """Yield the rows as samples for the system and a processor. Media are decoded when their batch starts."""
    for row in rows:
        yield Sample(
            id=row["id"],
            prompt=system.prompt,
            image=None if system.modality == "audio" else partial(open_clip_frames, row, **processor.frame_options),
            audio=None if system.modality == "image" else partial(open_audio, row),
            prefix=system.prefix,
        )


def caption_split(
    runner: CaptionRunner, rows: Dataset, system: System, split: str, out: Path | None = None
) -> Captioned:
    """Caption `rows` of `split`. With a folder `out`, captions are saved to `SPLIT-SYSTEM.jsonl` and resumed."""
    path = None if out is None else Path(out) / f"{split}-{system.name}.jsonl"
    captioned = Captioned(system, split, {})
    for result in runner.run(split_samples(rows, system, runner.processor), out=path, total=len(rows)):
        if result.error is None:
            captioned.captions[result.id] = result.caption
        else:
            captioned.failures[result.id] = result.error
    return captioned


def source_phrases(rows: Dataset, column: str, names: Callable[[str], tuple[str, ...]]) -> dict[str, list]:
    """Clip id -> phrases for each source in `column` of the row (`labels` or `seen`)."""
    return {row["id"]: [list(names(source)) for source in row[column]] for row in rows.select_columns(["id", column])}


def score_split(
    scorer: CaptionScorer,
    rows: Dataset,
    captioned: list[Captioned],
    seed: int,
    names: Callable[[str], tuple[str, ...]] | None = None,
) -> list[Row]:
    """
    Score systems that captioned the same split, on the clips that all of them captioned.

    Args:
        scorer: the scorer, which tokenizes all captions in one run.
        rows: the split, with reference captions.
        captioned: the captions of the systems.
        seed: seed of the run, for the table.
        names: function from a source to the phrases that name it, for a corpus with known sources (AVWorld).

    Returns:
        One row of the table per system.

    Raises:
        ValueError: a clip has no reference, or no clip has captions by all systems.
    """
    references = {row["id"]: row["captions"] for row in rows.select_columns(["id", "captions"])}
    common = [name for name in references if all(name in one.captions for one in captioned)]
    references = {name: references[name] for name in common}
    systems = {one.system.name: {name: one.captions[name] for name in common} for one in captioned}
    scores = scorer.score_many(systems, references, progress=True)
    sounding = source_phrases(rows, "labels", names) if names else None
    seen = source_phrases(rows, "seen", names) if names else None
    table = []
    for one in captioned:
        metrics, reasons = scores[one.system.name]
        if names:
            found, why = score_sources(systems[one.system.name], sounding, seen)
            metrics, reasons = {**metrics, **found}, {**reasons, **why}
        system = one.system
        table.append(Row(system.method, system.stage, system.modality, one.split, seed, len(common), metrics, reasons))
    return table
