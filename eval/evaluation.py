"""Evaluating a captioner on a split of a corpus: systems, captions and scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset

from dali_llava.eval.avworld.source_metrics import score_sources
from dali_llava.processing.corpora.rows import open_audio, open_clip_frames

from .bootstrap import intervals
from .caption_metrics import CaptionScorer
from .results import Row
from .runner import CaptionRunner, Sample
from .score_files import score_record, write_scores


SOURCES = ("labels", "seen")  # columns with the sources of a clip


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


def score_split(
    scorer: CaptionScorer,
    rows: Dataset,
    captioned: list[Captioned],
    seed: int,
    classes: Mapping[str, Sequence[str]] | None = None,
    out: Path | None = None,
) -> list[Row]:
    """
    Score systems that captioned the same split, on the clips that all of them captioned.

    Args:
        scorer: the scorer, which tokenizes all captions in one run.
        rows: the split, with reference captions.
        captioned: the captions of the systems.
        seed: seed of the run, for the table.
        classes: class -> phrases that name it, for a corpus with known sources (AVWorld).
        out: folder for the scores of every clip, `SPLIT-SYSTEM.scores.json`.

    Returns:
        One row of the table per system.

    Raises:
        ValueError: a clip has no reference, or no clip has captions by all systems.
    """
    names = ("captions", *(SOURCES if classes else ()))
    columns = {name: dict(zip(rows["id"], rows[name], strict=True)) for name in names}
    common = [name for name in rows["id"] if all(name in one.captions for one in captioned)]
    references = {name: columns["captions"][name] for name in common}
    systems = {one.system.name: {name: one.captions[name] for name in common} for one in captioned}
    scores = scorer.score_many(systems, references, progress=True)
    table = []
    for one in captioned:
        system, scored = one.system, scores[one.system.name]
        if classes:
            scored |= score_sources(systems[system.name], *(columns[name] for name in SOURCES), classes)
        if out is not None:
            record = score_record(scored, references, scorer.tokenizer)
            write_scores(Path(out) / f"{one.split}-{system.name}.scores.json", record)
        table.append(
            Row(
                system.method,
                system.stage,
                system.modality,
                one.split,
                seed,
                len(common),
                scored.metrics,
                scored.reasons,
                {name: list(interval) for name, interval in intervals(scored.clips).items()},
            )
        )
    return table
