"""
Stage 0 of DALI, the pre-filter: keep the clips in which the image shows the sound source (appendix C of the paper).

The first frame of each second is captioned, up to ten frames per clip. The score of a clip is the mean distance
between its captions and its labels in a text embedding space. Scores are saved as they are computed: an interrupted
run is resumed, and changing `keep` or `threshold` reuses all scores. The pre-filter runs in one process and trains
nothing; the training fields have no effect.

    python train/prefilter.py train/configs/avworld/prefilter.yaml \
        --captioner runs/captioner --output_dir runs/filtered
"""

import sys
from copy import deepcopy

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from dali_llava.eval.runner import weights_digest
from dali_llava.processing.inspect.clip_page import PAGE
from dali_llava.train.arguments import PrefilterArguments
from dali_llava.train.command_line import parse_stage_arguments, run_stage
from dali_llava.train.data.corpus import load_rows
from dali_llava.train.filtering.distance import check_choice, choose, score_clips
from dali_llava.train.filtering.models import (
    Caption,
    Embed,
    language_model,
    load_captioner,
    load_language_model,
    load_sentence_embed,
    make_caption,
    make_embed,
)
from dali_llava.train.filtering.scores import ScoreFolder


EMBEDDER_KINDS = ("language_model", "sentence")


def check_arguments(arguments: PrefilterArguments) -> None:
    """Raise a ValueError for invalid arguments before anything is loaded."""
    check_choice(arguments.keep, arguments.threshold)
    for name in ("frames", "batch_size", "caption_max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(arguments, name)}")
    if not arguments.captioner:
        raise ValueError("no captioner: give the checkpoint of an image captioner, --captioner DIR.")
    if arguments.embedder_kind not in EMBEDDER_KINDS:
        raise ValueError(f"unknown embedder_kind '{arguments.embedder_kind}'; supported: {', '.join(EMBEDDER_KINDS)}.")
    if arguments.embedder_kind == "sentence" and not arguments.embedder:
        raise ValueError("embedder_kind sentence: give the model, --embedder NAME.")
    if arguments.world_size > 1:
        raise ValueError("the pre-filter runs in one process; start it with python instead of accelerate launch.")


def load_models(arguments: PrefilterArguments) -> tuple[Caption, Embed, dict]:
    """Load the captioner and the embedder.

    Returns:
        the functions that caption and embed, and the digests of the models' weights.

    Raises:
        OSError, ValueError: as the loaders in `filtering.models`.
    """
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    captioner, processor = load_captioner(arguments.captioner, arguments.device, dtype)
    digests = {"captioner_weights": weights_digest(captioner)}
    caption = make_caption(captioner, processor, arguments.prompt, arguments.caption_max_new_tokens)
    if arguments.embedder_kind == "sentence":
        return caption, load_sentence_embed(arguments.embedder, arguments.device), digests
    if arguments.embedder:
        embedder, tokenizer = load_language_model(arguments.embedder, arguments.device, dtype)
    else:
        # A copy, because the captioner pads on the other side.
        embedder, tokenizer = language_model(captioner), deepcopy(processor.tokenizer)
    digests["embedder_weights"] = weights_digest(embedder)
    return caption, make_embed(embedder, tokenizer, arguments.layer), digests


def score_rows(
    rows: Dataset, folder: ScoreFolder, frames: int, caption: Caption, embed: Embed, batch_size: int
) -> dict:
    """
    Score the rows that have no score in `folder`, and save each block as soon as it is scored.

    The blocks are fixed, so that a resumed run computes the same batches as an uninterrupted one.

    Returns:
        {id: reason} of the rows that could not be scored; the next run tries them again.
    """
    left_out = {}
    ids = rows["id"]
    for start in tqdm(range(0, len(rows), batch_size), desc="pre-filter", unit="block", disable=None):
        block = range(start, min(start + batch_size, len(rows)))
        new = [index for index in block if ids[index] not in folder.scores]
        if new:
            scored, failed = score_clips((rows[index] for index in new), frames, caption, embed)
            folder.append(scored)
            left_out.update(failed)
    return left_out


def main(argv: list[str] | None = None) -> ScoreFolder:
    arguments = parse_stage_arguments(PrefilterArguments, __doc__, argv)
    check_arguments(arguments)
    rows = load_rows(arguments)
    caption, embed, digests = load_models(arguments)
    fields = ("dataset", "dataset_options", "split", "captioner", "prompt", "caption_max_new_tokens", "embedder")
    fields += ("embedder_kind", "layer", "frames", "bf16")
    settings = {name: getattr(arguments, name) for name in fields} | digests
    folder = ScoreFolder(arguments.output_dir, settings)
    # Scoring does not need the audio, which is the largest part of a row.
    silent = rows.remove_columns("audio")
    left_out = score_rows(silent, folder, arguments.frames, caption, embed, arguments.batch_size)
    rows = rows.select([index for index, name in enumerate(rows["id"]) if name in folder.scores])
    if not len(rows):
        raise ValueError(
            f"{arguments.dataset}, split {arguments.split}: no clip could be scored; first error: "
            f"{next(iter(left_out.values()))}"
        )
    kept = choose(np.array([folder.scores[name]["score"] for name in rows["id"]]), arguments.keep, arguments.threshold)
    if arguments.keep is None:
        choice = f"distance below {arguments.threshold:g}"
    else:
        choice = f"the nearest, at most {arguments.keep}"
    folder.finish(rows, kept, left_out, choice)
    print(f"{kept.sum()} of {len(rows)} clips kept; report: {folder.report / PAGE}")
    if left_out:
        name, reason = next(iter(left_out.items()))
        print(f"{len(left_out)} clips could not be scored; first error: {name}: {reason}", file=sys.stderr)
    return folder


if __name__ == "__main__":
    run_stage(main)
