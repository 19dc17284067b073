"""Arguments of the stages: one dataclass per stage, based on `transformers.TrainingArguments`."""

import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from dali_llava.processing.processing_llava_audio import SOUND_PROMPT
from dali_llava.train.data.augmentation import Augmentation


COUPLED_ADAM = "adam"  # `torch.optim.Adam`: the weight decay is added to the gradient, unlike AdamW's


def parse_options(name: str, value: dict | str | None) -> dict:
    """The mapping in the argument `name`, given as JSON on a command line. Raises ValueError for anything else."""
    try:
        options = json.loads(value) if isinstance(value, str) else dict(value or {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected JSON such as '{{\"seed\": 1}}', not {value!r}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"{name}: expected JSON such as '{{\"seed\": 1}}', not {value!r}.")
    return options


def import_plugins(names: Iterable[str]) -> None:
    """
    Import modules that register audio towers, objectives or corpora.

    Raises:
        ImportError: a module cannot be imported; the message names it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"plugins: cannot import {name} ({error}); install its package or add its folder to PYTHONPATH."
            ) from error


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

    # Extensions
    plugins: list[str] | None = field(
        default=None,
        metadata={"help": "Python modules to import first; they register audio towers, objectives or corpora."},
    )

    # Other defaults than transformers': a stage keeps its own columns, and saves once, at its end.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not name."})
    save_strategy: str = field(default="no", metadata={"help": "When to checkpoint: no, steps or epoch."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "Show no progress bar."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})

    def __post_init__(self):
        self.dataset_options = parse_options("dataset_options", self.dataset_options)
        import_plugins(self.plugins or ())
        super().__post_init__()
        # Pinned memory serves copies to an accelerator; without one torch would only warn.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


@dataclass
class SoundArguments(StageArguments):
    """
    Arguments of a stage that trains the audio tower: reading the corpus and augmenting the spectrograms.
    """

    # Input
    streaming: bool = field(
        default=False, metadata={"help": "Read the corpus while training and repeat it until max_steps."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows of a stream to shuffle at a time."})
    cache_features: bool = field(
        default=False,
        metadata={"help": "Compute spectrograms and image tokens once and keep them on disk, for a small corpus."},
    )

    # Augmentation of the spectrogram
    augmentation_noise: float = field(default=0.1, metadata={"help": "Largest amplitude of uniform noise."})
    augmentation_roll: int | None = field(
        default=None, metadata={"help": "Largest roll in time, in frames; all by default."}
    )
    augmentation_equaliser: float = field(
        default=0.0, metadata={"help": "Standard deviation of a random gain per mel bin, in normalised log-mel."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.streaming:
            # Each rank reads its own part of the stream; by default the first one would read for all.
            self.accelerator_config.dispatch_batches = False

    def augmentation(self, **others) -> Augmentation:
        """The `Augmentation` of these arguments, with its other fields from `others`."""
        options = {name: getattr(self, f"augmentation_{name}") for name in ("noise", "roll", "equaliser")}
        return Augmentation(**options, **others)


@dataclass
class PrefixArguments(StageArguments):
    """Arguments of the prefix tuning."""

    prompt: str = field(default=SOUND_PROMPT, metadata={"help": "Question that follows the prefix."})
    split: str = field(default="shots", metadata={"help": "Split with captioned pictures."})
    max_samples: int | None = field(default=16, metadata={"help": "How many of them: the shots."})
    frame: int | None = field(default=None, metadata={"help": "Frame to show; a random one each epoch by default."})


@dataclass
class AlignmentArguments(SoundArguments):
    """
    Arguments of the alignment: the objective, the optimiser and their schedules.
    """

    _VALID_DICT_FIELDS = [*SoundArguments._VALID_DICT_FIELDS, "objective_options"]

    # Objective
    objective: str = field(
        default="mmd", metadata={"help": "Loss to minimise, by its name in dali_llava.train.losses.LOSSES."}
    )
    objective_options: dict | str | None = field(
        default=None, metadata={"help": "Its arguments, as JSON: '{\"num_heads\": 4}'."}
    )

    schedule_epochs: int | None = field(
        default=None,
        metadata={"help": "Epochs of the objective's schedule in a run of max_steps; by default those of the data."},
    )

    # Input
    frame: int | None = field(
        default=None, metadata={"help": "Frame to align with; by default a random frame of the clip in each epoch."}
    )

    # Optimiser: by default as in the reference implementation
    optim: str = field(
        default=COUPLED_ADAM,
        metadata={
            "help": "Optimizer: adam (the weight decay is added to the gradient), or a name of transformers' optim."
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the audio tower."})
    objective_learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Constant learning rate of the objective's parameters, without weight decay."},
    )
    adam_beta1: float = field(default=0.95, metadata={"help": "Adam's beta1."})
    weight_decay: float = field(default=5e-7, metadata={"help": "Weight decay of all the audio tower's weights."})
    halve_from: float = field(default=10, metadata={"help": "Epoch at which the learning rate is first halved."})
    halve_every: float = field(
        default=0, metadata={"help": "Epochs between two halvings; 0: use lr_scheduler_type instead."}
    )

    def __post_init__(self):
        self.objective_options = parse_options("objective_options", self.objective_options)
        names = [COUPLED_ADAM, *(each.value for each in OptimizerNames)]
        if self.optim not in names:
            raise ValueError(f"optim: unknown optimizer '{self.optim}'; known: {', '.join(names)}.")
        optim = self.optim
        if optim == COUPLED_ADAM:
            self.optim = OptimizerNames.ADAMW_TORCH  # `TrainingArguments` knows its own names only
        super().__post_init__()
        if optim == COUPLED_ADAM:
            self.optim = optim


@dataclass
class DistillationArguments(StageArguments):
    """Arguments of the distillation: how the pseudo-captions are made, and the training's own."""

    split: str = field(default="balanced", metadata={"help": "Split to caption and to learn from."})
    prompt: str = field(default=SOUND_PROMPT, metadata={"help": "Question, in captioning and in training."})
    caption_temperature: float = field(default=0.2, metadata={"help": "Temperature of the sampling; 0 is greedy."})
    caption_max_new_tokens: int = field(default=128, metadata={"help": "Longest pseudo-caption, in tokens."})
    caption_batch_size: int = field(default=16, metadata={"help": "Clips captioned at a time."})


@dataclass
class PrefilterArguments(StageArguments):
    """Arguments of the pre-filter: its two models, what it keeps, and the corpus, which every stage has."""

    # Models
    captioner: str | None = field(default=None, metadata={"help": "Image captioner: checkpoint folder or Hub id."})
    prompt: str | None = field(
        default=None, metadata={"help": "Question to the captioner; by default its own kind's."}
    )
    caption_max_new_tokens: int = field(default=32, metadata={"help": "Longest caption, in tokens."})
    embedder: str | None = field(
        default=None, metadata={"help": "Language model of the embeddings; by default the captioner's own."}
    )
    embedder_kind: str = field(
        default="language_model", metadata={"help": "language_model, or sentence (sentence-transformers)."}
    )
    layer: int = field(default=-1, metadata={"help": "Hidden states to average: 0 word embeddings, -1 last layer."})

    # Choice
    frames: int = field(default=10, metadata={"help": "Most frames of a clip, the first of each second."})
    keep: int | None = field(default=None, metadata={"help": "Keep so many clips, the nearest."})
    threshold: float | None = field(default=None, metadata={"help": "Keep the clips under this distance."})
    batch_size: int = field(default=16, metadata={"help": "Clips captioned at a time, and kept in a part."})
