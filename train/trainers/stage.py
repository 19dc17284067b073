"""What every stage shares: its arguments, what it freezes, and a checkpoint that holds what it trained."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.modeling.stage_checkpoint import stage_names
from dali_llava.processing import LlavaAudioProcessor


@dataclass
class StageArguments(TrainingArguments):
    """
    Arguments of a stage: those of `transformers.TrainingArguments`, and where model and corpus come from.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "dataset_options"]

    # Model
    base_model: str | None = field(
        default=None, metadata={"help": "Checkpoint or Hub id that the stage starts from; the stage before it."}
    )

    # Corpus
    dataset: str = field(default="avworld", metadata={"help": "Corpus, by its name in dali_llava.processing.corpora."})
    dataset_options: dict | str | None = field(
        default=None, metadata={"help": "Options of the corpus, as JSON: '{\"seed\": 1}'."}
    )
    split: str = field(default="train", metadata={"help": "Split to train on."})
    kept: str | None = field(
        default=None, metadata={"help": "Folder of a pre-filter (train/prefilter.py): use the rows it kept."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Use the first so many rows; all by default."})

    # Other defaults than transformers': a stage keeps its own columns, and saves once, at its end.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not name."})
    save_strategy: str = field(default="no", metadata={"help": "When to checkpoint: no, steps or epoch."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "Show no progress bar."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})

    def __post_init__(self):
        self.dataset_options = parse_options("dataset_options", self.dataset_options)
        super().__post_init__()


def parse_options(name: str, value: dict | str | None) -> dict:
    """The mapping that the argument `name` gives, in JSON on a command line; ValueError where it is none."""
    try:
        options = json.loads(value) if isinstance(value, str) else dict(value or {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected JSON such as '{{\"seed\": 1}}', not {value!r}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"{name}: expected JSON such as '{{\"seed\": 1}}', not {value!r}.")
    return options


class StageProgress(ProgressCallback):
    """Progress on stderr with the last loss beside it; stdout stays free for results."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.4g}" for name in ("loss", "eval_loss") if name in logs}
            self.training_bar.set_postfix(shown)


# What writes a stage, by the word its name begins with.
SCRIPTS = {"prefix": "train/prefix_tune.py", "align": "train/align.py"}


def check_base(arguments: StageArguments, after: Sequence[str] = ()) -> None:
    """
    Whether a stage's base model is there and has been through the stages before it, before anything is loaded.

    Args:
        after: the stages that must have come before, of `SCRIPTS`. A whole checkpoint does not tell which it has been
            through; its user is to know.

    Raises:
        ValueError: when no base is named, the one named is no folder, or lacks a stage of `after`.
    """
    base = arguments.base_model
    if not base:
        raise ValueError("no base_model: name the checkpoint of the stage before this one, --base_model DIR.")
    if os.sep in base and not Path(base).is_dir():
        raise ValueError(f"base_model {base}: no such directory; run the stage that writes it first.")
    been = stage_names(base)
    missing = [stage for stage in after if not any(name.partition(":")[0] == stage for name in been)]
    if been and missing:
        raise ValueError(
            f"base_model {base} has been through {', '.join(reversed(been))} only; run {SCRIPTS[missing[0]]} first."
        )


def load_base(arguments: StageArguments) -> tuple[LlavaAudioForConditionalGeneration, LlavaAudioProcessor]:
    """The captioner that a stage starts from, and its processor. `check_base` comes first, then the corpus."""
    base = arguments.base_model
    return LlavaAudioForConditionalGeneration.from_pretrained(base), LlavaAudioProcessor.from_pretrained(base)


def train_only(model: nn.Module, *parts: nn.Module) -> None:
    """Freeze `model` but for `parts`; a tower without a trained weight builds no graph."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


class StageTrainer(Trainer):
    """
    Trainer whose checkpoint is the stage's: the trained weights, the base model's name, and the processor.

    Args:
        captioner: the `LlavaAudioForConditionalGeneration` whose trained weights are saved.
    """

    def __init__(self, *args, captioner: LlavaAudioForConditionalGeneration, stage: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.captioner, self.stage = captioner, stage
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StageProgress)
        self.remove_callback(PrinterCallback)

    @property
    def broken_clips(self) -> int:
        """How many clips of this rank could not be opened and gave way to others; see `ClipOpener`."""
        return self.data_collator.opener.broken if hasattr(self.data_collator, "opener") else 0

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As `Trainer.log`, with `broken_clips` where there are any."""
        super().log(logs | {"broken_clips": self.broken_clips} if self.broken_clips else logs, *args, **kwargs)

    def summary(self) -> str:
        """A finished stage in a line; every rank is to ask for it."""
        broken = self.accelerator.reduce(torch.tensor(self.broken_clips, device=self.accelerator.device)).item()
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        line = f"{self.args.output_dir}: {self.stage}, {self.state.global_step} steps"
        line += f", the last loss {losses[-1]:.4g}" if losses else ""
        return line + (f"; {broken} times a clip could not be opened, and another took its place" if broken else "")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:  # every rank is asked
            return
        output_dir = output_dir or self.args.output_dir
        if self.args.base_model is None:  # the first stage trains a whole captioner
            self.captioner.save_pretrained(output_dir)
        else:
            self.captioner.save_stage(output_dir, base=self.args.base_model, stage=self.stage)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
