"""Evaluation of all objectives, stages and modalities of a run on the test splits of AVWorld."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.avworld import SOUND_WORDS, VISUAL_WORDS
from dali_llava.processing.processing_llava_audio import SEE_PROMPT, SOUND_PROMPT

from ..caption_metrics import CaptionScorer
from ..captioner import load_captioner
from ..evaluation import Captioned, System, caption_split, score_split
from ..mean_tokens import mean_tokens, modality_gap
from ..results import Claim, Row
from ..runner import CaptionRunner
from . import claims as check
from .recordings import RECORDINGS_SPLIT, score_recordings
from .source_metrics import class_phrases, visual_bias


BATCH_SIZE = 100
MAX_NEW_TOKENS = 32
SPLITS = ("test", "test_shifted")
SHOWN = 10  # clips whose captions are shown


@dataclass
class Comparison:
    """
    The result of `compare`.

    Attributes:
        rows, claims: rows and claims for results.json.
        examples: (reference, {name of the system: caption}) for a few clips of `test`.
        image_tokens: (clips, D) mean image tokens of `test`.
        audio_tokens: (clips, D) mean audio tokens of `test` by method.
    """

    rows: list[Row]
    claims: list[Claim]
    examples: list[tuple[str, dict[str, str]]]
    image_tokens: np.ndarray
    audio_tokens: dict[str, np.ndarray] = field(default_factory=dict)


def compare(
    folders: Mapping[str, Path], methods: Sequence[str], seed: int, out: Path, recordings: Path | None = None
) -> Comparison:
    """
    Caption `test` and `test_shifted` with every system of a run, and score the captions.

    Args:
        folders: folders of the checkpoints: `captioner`, `prefix`, `METHOD-aligned`, `METHOD-distilled`, `model`.
        methods: the objectives.
        seed: seed of the run, for the rows.
        out: output folder of the captions, `captions/SPLIT-SYSTEM.jsonl`, or `captions_recordings/` with `recordings`.
        recordings: folder of ESC-10. Its fold 4 replaces the sounds of the splits and is an additional split.
    """
    options = {} if recordings is None else {"recordings": str(recordings)}
    # Recordings change the sound of the clips but not their ids, so their captions need another folder.
    captions = out / ("captions" if recordings is None else "captions_recordings")
    splits = {split: load_corpus("avworld", split, num_proc=os.cpu_count(), **options) for split in SPLITS}
    test, said, rows, bias, audio_tokens = splits["test"], {split: [] for split in SPLITS}, [], {}, {}

    def runner(name: str) -> CaptionRunner:
        return CaptionRunner(*load_captioner(folders[name]), batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS)

    def ask(captioner: CaptionRunner, system: System, split: str = "test") -> dict[str, str]:
        captioned = caption_split(captioner, splits[split], system, split, captions)
        if system.prompt == SOUND_PROMPT:
            said[split].append(captioned)
        return captioned.captions

    prefixed = runner("prefix")
    image_tokens = mean_tokens(prefixed.model, prefixed.processor, test, "image")
    before = ask(prefixed, System("image_only", "prompt", "image", SOUND_PROMPT, prefix=False))
    ask(prefixed, System("image_only", "prefix", "image", SOUND_PROMPT, prefix=True))
    ask(prefixed, System("untrained", "prefix", "audio", SOUND_PROMPT, prefix=True))
    for method in methods:
        for stage in ("aligned", "distilled"):
            captioner = runner(f"{method}-{stage}")
            heard = System(method, stage, "audio", SOUND_PROMPT)
            for split in SPLITS:
                ask(captioner, heard, split)
                ask(captioner, System(method, stage, "audiovisual", SOUND_PROMPT), split)
            if recordings is not None:
                rows.append(score_recordings(captioner, recordings, heard, seed, captions))
            if stage == "aligned":
                unasked = ask(captioner, System(method, "prompt", "audio", SEE_PROMPT, prefix=False))
                bias[method] = visual_bias(list(unasked.values()), sorted(VISUAL_WORDS))
                audio_tokens[method] = mean_tokens(captioner.model, captioner.processor, test, "audio")
    after = caption_split(
        runner("model"), test, System("image_only", "after", "image", SOUND_PROMPT, False), "test", captions
    ).captions

    with CaptionScorer() as scorer:
        classes = class_phrases()
        scored = [score_split(scorer, splits[split], said[split], seed, classes, captions) for split in SPLITS]
    rows = [row for table in scored for row in table] + rows
    table = {(row.method, row.stage, row.modality, row.split): row for row in rows}
    for method, value in bias.items():
        row = table[method, "aligned", "audio", "test"]
        row.metrics["visual_bias"] = value
        row.reason.pop("visual_bias", None)
    gaps = {method: modality_gap(tokens, image_tokens) for method, tokens in audio_tokens.items()}
    claims = [
        check.captions_are_visual(before, SOUND_WORDS),
        check.prefix_turns_to_sound(table["image_only", "prefix", "image", "test"]),
        check.captions_unchanged(before, after, "before and after all stages"),
        *method_claims(table, methods, gaps),
    ]
    return Comparison(rows, claims, list(show_examples(test, said["test"])), image_tokens, audio_tokens)


def method_claims(table: Mapping[tuple, Row], methods: Sequence[str], gaps: Mapping[str, float]) -> list[Claim]:
    """The claims of the paper about the methods of the run, checked on `test` (see docs/results.md).

    Args:
        table: rows by (method, stage, modality, split).
        methods: the objectives.
        gaps: modality gap of each method.
    """

    def row(method: str, stage: str, modality: str = "audio") -> Row:
        return table[method, stage, modality, "test"]

    claims = [check.hears(row(method, "aligned"), table["untrained", "prefix", "audio", "test"]) for method in methods]
    if "ot_att" in methods:
        claims.append(check.names_sources(row("ot_att", "aligned")))
    for stage in ("aligned", "distilled"):
        claims += [
            check.above_contrastive(row(method, stage), row("contrastive", stage))
            for method in methods
            if "contrastive" in methods and method != "contrastive"
        ]
        image = table["image_only", "prefix", "image", "test"]
        claims += [
            check.senses_add_up(row(method, stage, "audiovisual"), row(method, stage), image) for method in methods
        ]
    claims += [check.distillation_lifts(row(method, "aligned"), row(method, "distilled")) for method in methods]
    if {"mmd", "ot_att"} <= set(methods):
        claims.append(check.less_visual_bias(row("ot_att", "aligned"), row("mmd", "aligned")))
    if "contrastive" in methods:
        claims += [check.closes_gap(method, gaps) for method in methods if method != "contrastive"]
    heard = [found for found in table.values() if found.split == RECORDINGS_SPLIT and found.stage == "aligned"]
    return claims + [check.hears_recordings(found) for found in heard]


def show_examples(rows: Dataset, said: Sequence[Captioned]):
    """Yield the first reference of a few clips, and the captions by each system with audio, by name of the system."""
    for row in rows.select(range(min(SHOWN, len(rows)))):
        captions = {
            one.system.name: one.captions.get(row["id"], "-")
            for one in said
            if one.system.modality != "image" and one.system.method != "untrained"
        }
        yield row["captions"][0], captions
