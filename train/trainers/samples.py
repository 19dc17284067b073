"""Captions of a few fixed clips, generated during the training of a captioner."""

import json
import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from transformers import Trainer

from dali_llava.atomic import write_text
from dali_llava.eval.runner import CaptionRunner

from .monitoring import PeriodicCallback


logger = logging.getLogger(__name__)

CLIPS = 4  # first clips of the evaluation dataset, or of the training dataset without one
MAX_NEW_TOKENS = 48
SAMPLES = "samples.jsonl"


class SampleCaptions(PeriodicCallback):
    """
    Captions the first clips of the evaluation dataset, or of the training dataset without one, with greedy search.

    The captions are appended to `samples.jsonl` in the output folder, one line per clip (step, id, caption,
    reference), and passed to the trackers of `report_to` as the text `samples`. The media, the question and the
    prefix are those that the collator trains with.

    Args:
        trainer: trainer of a captioner, whose collator has a method `sample`.
        steps: number of steps between two measurements.
    """

    def __init__(self, trainer: Trainer, steps: int):
        super().__init__(steps)
        self.trainer = trainer
        self.path = Path(trainer.args.output_dir) / SAMPLES

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        self.rows = list(islice(rows, CLIPS))
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(f"{line}\n" for line in self._lines_until(state.global_step)))
        super().on_train_begin(args, state, control, **kwargs)

    def _lines_until(self, step: int) -> Iterable[str]:
        """The lines that a resumed run keeps. A run from the start replaces the file."""
        if step == 0 or not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    yield line
            except (ValueError, KeyError, TypeError):  # the last line of a killed run
                continue

    def measure(self, state, control) -> None:
        trainer = self.trainer
        model = trainer.pretrained
        runner = CaptionRunner(
            model, trainer.processing_class, batch_size=CLIPS, max_new_tokens=MAX_NEW_TOKENS, num_beams=1
        )
        asked = [trainer.data_collator.sample(row) for row in self.rows]
        results = list(runner.run([sample for sample, _ in asked], progress=False))
        model.train()
        if not state.is_world_process_zero:
            return
        lines = []
        for result, (_, reference) in zip(results, asked, strict=True):
            if result.error is not None:
                logger.warning("sample caption of %s: %s", result.id, result.error)
                continue
            lines.append(
                {"step": state.global_step, "id": result.id, "caption": result.caption, "reference": reference}
            )
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        # To the trackers alone: an entry of `Trainer.log` would copy the text into every checkpoint.
        trainer.callback_handler.call_event("on_log", trainer.args, state, control, logs={"samples": as_table(lines)})


def as_table(lines: list[dict]) -> str:
    """Return samples as a Markdown table with the columns id, caption and reference."""
    names = ("id", "caption", "reference")
    rows = [names, ("---",) * len(names), *([line[name].replace("|", "\\|") for name in names] for line in lines)]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in row)} |" for row in rows)
