"""
Pseudo-captions: the captions of a split by the aligned model, generated on all ranks and saved with their provenance.

    rows -> each rank: every n-th row -> CaptionRunner -> .pseudo_captions/SETTINGS/rank-R.jsonl
         -> all ranks: gather -> pseudo_captions.parquet
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset

from dali_llava import __version__
from dali_llava.eval.runner import CaptionRunner, Sample, read_results
from dali_llava.modeling.checkpoint_digest import checkpoint_digest
from dali_llava.modeling.loading import find_checkpoint
from dali_llava.processing.corpora.rows import open_audio, open_clip_frames
from dali_llava.train.arguments import DistillationArguments
from dali_llava.train.data.caption_file import (
    CAPTIONS,
    PseudoCaption,
    differences,
    read_captions,
    settings_of,
    write_captions,
)


logger = logging.getLogger(__name__)

PARTS = ".pseudo_captions"  # folder of the ranks' unfinished captions, in the output folder
STOP = "stop"  # file in a folder of parts: a rank has failed


class PseudoCaptions:
    """
    The pseudo-captions of a distillation in its output folder.

    Captions depend on the provenance and the clip only. The number of ranks, the batch size and the order have no
    effect, except through rounding. Call all methods on all ranks, before the model is partitioned.

    Args:
        arguments: arguments of the distillation.
        rows: rows to caption, with unique ids.

    Attributes:
        provenance: what the captions depend on, the name of the base model and the version of the package.

    Raises:
        ValueError: an id appears twice, or a weight file of the base model is damaged.
    """

    def __init__(self, arguments: DistillationArguments, rows: Dataset):
        self.arguments, self.rows = arguments, rows
        self.names = list(rows["id"])
        if len(set(self.names)) < len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise ValueError(f"{arguments.dataset}, split {arguments.split}: the id {twice!r} appears twice.")
        self.provenance = _on_main_process(arguments, lambda: provenance_of(arguments))
        self.path = Path(arguments.output_dir) / CAPTIONS
        settings = json.dumps(settings_of(self.provenance), sort_keys=True)
        self.parts = Path(arguments.output_dir) / PARTS / hashlib.sha256(settings.encode()).hexdigest()[:16]

    def find(self) -> dict[str, PseudoCaption]:
        """
        The finished captions by id: those of `arguments.captions`, or those in the output folder. Loads no weights.

        Raises:
            ValueError: the output folder has captions of another provenance, or a file is not one of captions.
            FileNotFoundError: `arguments.captions` does not exist.
        """
        (self.parts / STOP).unlink(missing_ok=True)
        return _on_main_process(self.arguments, self._find)

    def _find(self) -> dict[str, PseudoCaption]:
        if self.arguments.captions is not None:
            found, provenance = read_captions(self.arguments.captions)
            if changed := differences(provenance, self.provenance):
                logger.warning("%s: captions of other settings: %s", self.arguments.captions, "; ".join(changed))
            return found
        found = {}
        if self.path.exists():
            found, provenance = read_captions(self.path)
            if changed := differences(provenance, self.provenance):
                raise ValueError(
                    f"{self.path}: captions of other settings: {'; '.join(changed)}; use another output_dir, delete "
                    f"the file to caption again, or train on these captions with --captions {self.path}."
                )
        for part in sorted(self.parts.glob("*.jsonl")):
            found |= {result.id: PseudoCaption(result.caption) for result in read_results(part)}
        return found

    def generate(self, captioner, processor, found: Mapping[str, PseudoCaption]) -> dict[str, PseudoCaption]:
        """
        Caption the rows that are not in `found` from image, audio and prefix on all ranks, and save all captions.

        Args:
            captioner, processor: the base model, with whole weights on each rank.
            found: captions of `find`.

        Returns:
            the captions by id, with those of `found`.

        Raises:
            Exception: the error of this rank.
            ValueError: another rank had a ValueError or an OSError.
            RuntimeError: another rank had another error.
        """
        missing = [index for index, name in enumerate(self.names) if name not in found]
        rank, ranks = self.arguments.process_index, self.arguments.world_size
        captions, failure = {}, None
        try:
            for name, caption in self._caption(captioner, processor, self.rows.select(missing[rank::ranks])):
                captions[name] = caption
        except Exception as error:  # the other ranks must not wait for this one
            failure = error
            with suppress(OSError):
                self.parts.mkdir(parents=True, exist_ok=True)
                (self.parts / STOP).touch()
        gathered = _gather(self.arguments, (captions, failure and _describe(rank, failure)))
        if failure is not None:
            raise failure
        for _, reported in gathered:
            if reported is not None:
                kind, message = reported
                raise kind(message)
        generated = {name: caption for part, _ in gathered for name, caption in part.items()}
        everything = {**found, **generated}
        everything = {name: everything[name] for name in self.names} | everything  # in the order of the rows
        _on_main_process(self.arguments, lambda: self._save(everything, generated))
        return everything

    def _caption(self, captioner, processor, rows: Dataset) -> Iterator[tuple[str, PseudoCaption]]:
        """Caption the rows of this rank, until another rank fails."""
        arguments = self.arguments

        def samples() -> Iterator[Sample]:
            for row in rows:
                if (self.parts / STOP).exists():
                    return
                image = partial(open_clip_frames, row, **processor.frame_options)
                audio = partial(open_audio, row)
                yield Sample(row["id"], arguments.prompt, image, audio, prefix=True)

        runner = CaptionRunner(
            captioner,
            processor,
            batch_size=arguments.caption_batch_size,
            max_new_tokens=arguments.caption_max_new_tokens,
            temperature=arguments.caption_temperature,
            seed=arguments.seed,
            device=arguments.device,
        )
        out = self.parts / f"rank-{arguments.process_index}.jsonl"
        for result in runner.run(samples(), out=out, total=len(rows), progress=arguments.process_index == 0):
            yield result.id, PseudoCaption(result.caption, result.error)

    def _save(self, captions: Mapping[str, PseudoCaption], generated: Mapping[str, PseudoCaption]) -> None:
        errors = [caption.error for caption in generated.values() if caption.error is not None]
        if errors:
            logger.warning(
                "%d of %d clips could not be captioned; first error: %s", len(errors), len(generated), errors[0]
            )
        write_captions(self.path, captions, self.provenance)
        shutil.rmtree(self.parts, ignore_errors=True)
        with suppress(OSError):  # captions of other settings
            self.parts.parent.rmdir()


def provenance_of(arguments: DistillationArguments) -> dict[str, Any]:
    """What the captions depend on, the name of the base model and the version of the package, as JSON values."""
    return {
        "checkpoint": checkpoint_digest(find_checkpoint(arguments.base_model)),
        "dataset": arguments.dataset,
        "dataset_options": arguments.dataset_options,
        "prompt": arguments.prompt,
        "modality": "audiovisual",
        "prefix": True,
        "caption_temperature": arguments.caption_temperature,
        "caption_max_new_tokens": arguments.caption_max_new_tokens,
        "seed": arguments.seed if arguments.caption_temperature > 0 else None,
        "base_model": arguments.base_model,
        "version": __version__,
    }


def _describe(rank: int, error: Exception) -> tuple[type[Exception], str]:
    kind = ValueError if isinstance(error, ValueError | OSError) else RuntimeError
    return kind, f"captioning failed on rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}"


def _gather(arguments: DistillationArguments, value: Any) -> list:
    """The values of all ranks, in their order, on all ranks."""
    return gather_object([value]) if arguments.world_size > 1 else [value]


def _on_main_process(arguments: DistillationArguments, compute: Callable[[], Any]) -> Any:
    """The result of `compute` on the main process, on all ranks. If it fails, all ranks raise its error."""
    if arguments.world_size == 1:
        return compute()
    shared = [None, None]
    if arguments.process_index == 0:
        try:
            shared[0] = compute()
        except (ValueError, OSError) as error:
            shared[1] = error
    result, error = broadcast_object_list(shared)
    if error is not None:
        raise error
    return result
