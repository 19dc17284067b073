"""Arguments of the stages: one dataclass per stage, based on `transformers.TrainingArguments`."""

import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from dali_llava.processing.processing_llava_audio import SOUND_PROMPT
from dali_llava.train.data.augmentation import Augmentation
from dali_llava.train.engines import check_launch, set_engine
from dali_llava.train.precision import check_precision


# Value of `cache_features` by its spellings: a boolean in YAML stands for all or none.
FEATURE_CACHES = {"none": "none", "disk": "disk", "all": "all"}
FEATURE_CACHES |= dict.fromkeys(("true", "1"), "all") | dict.fromkeys(("false", "0"), "none")
COUPLED_ADAM = "adam"  # `torch.optim.Adam`: the weight decay is added to the gradient, unlike AdamW's
# What to install for the trackers of `report_to`, which are also the names of their packages.
TRACKERS = {"tensorboard": '"dali-llava[tensorboard]"', "wandb": "wandb", "trackio": "trackio"}


def parse_options(name: str, value: dict | str | None) -> dict:
    """Return the mapping in the argument `name`, which may be JSON. Raises a ValueError for any other value."""
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


def check_trackers(names: list[str]) -> None:
    """
    Check `report_to` before anything is loaded.

    Raises:
        ValueError: transformers has no integration of this name.
        ImportError: the tracker's package is not installed.
    """
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ValueError(f"report_to: {error}") from error
    missing = [name for name in TRACKERS if name in names and find_spec(name) is None]
    if missing:
        raise ImportError(
            f"report_to: {missing[0]} is not installed; run pip install {TRACKERS[missing[0]]}, or choose another "
            "tracker or none."
        )


def check_not_negative(arguments: TrainingArguments, *names: str) -> None:
    """Raise a ValueError if one of the arguments is negative."""
    for name in names:
        if getattr(arguments, name) < 0:
            raise ValueError(f"{name} must be at least 0, not {getattr(arguments, name)}.")


@dataclass
class StageArguments(TrainingArguments):
    """
    Arguments of a stage: those of `transformers.TrainingArguments`, the base model and the corpus.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "dataset_options"]

    # Model
    base_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model to start from: the previous stage."}
    )
    frozen_dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the frozen parts: float32, bfloat16, float16, or auto for that of the base model. "
            "What trains is float32."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of the model: eager, sdpa, flash_attention_2 or another of transformers; default: sdpa."
        },
    )

    # Device
    force: bool = field(
        default=False, metadata={"help": "Train although the estimated memory exceeds that of the device."}
    )

    # Corpus
    dataset: str = field(default="avworld", metadata={"help": "Name of the corpus in dali_llava.processing.corpora."})
    dataset_options: dict | str | None = field(
        default=None, metadata={"help": "Options of the corpus, as JSON: '{\"seed\": 1}'."}
    )
    split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate the loss on, for eval_strategy steps or epoch."}
    )
    kept: str | None = field(
        default=None, metadata={"help": "Output folder of train/prefilter.py: use only the rows it kept."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Number of rows to use; all by default."})

    # Extensions
    plugins: list[str] | None = field(
        default=None,
        metadata={"help": "Python modules to import first, which register audio towers, objectives or corpora."},
    )

    # Defaults that differ from transformers': a stage keeps its columns, and saves once, at its end.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that the model does not use."})
    save_strategy: str = field(default="no", metadata={"help": "When to checkpoint: no, steps or epoch."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "Disable the progress bar."})
    logging_steps: float = field(default=10, metadata={"help": "Number of steps between two log lines."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to resume from: a folder, or true for the newest complete one in output_dir."},
    )
    report_to: None | str | list[str] = field(
        default=None,
        metadata={
            "help": "Trackers to log to: tensorboard, wandb, trackio or another of transformers, or none; by default "
            "tensorboard if it is installed. TensorBoard's files are in the folder runs of the output folder."
        },
    )

    def __post_init__(self):
        self.dataset_options = parse_options("dataset_options", self.dataset_options)
        import_plugins(self.plugins or ())
        if str(self.eval_strategy) not in ("no", "IntervalStrategy.NO") and self.eval_split is None:
            raise ValueError(f"eval_strategy {self.eval_strategy}: no split to evaluate on; give --eval_split NAME.")
        if self.report_to is None:
            self.report_to = "tensorboard" if find_spec("tensorboard") else "none"
        check_launch(self)
        super().__post_init__()
        set_engine(self)
        check_trackers(self.report_to)
        check_precision(self)
        # Pinned memory speeds up copies to an accelerator; without one, torch prints a warning.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


@dataclass
class SoundArguments(StageArguments):
    """
    Arguments of a stage that trains the audio tower: how it reads the corpus and augments the spectrograms.
    """

    # Input
    streaming: bool = field(
        default=False, metadata={"help": "Read the corpus during training and repeat it until max_steps."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Number of rows in the shuffle buffer of a stream."})
    cache_features: str = field(
        default="none",
        metadata={
            "help": "Features to store on disk: none; disk, the image tokens of cache_frames frames in bfloat16; or "
            "all (also true), the image tokens of all frames and the spectrograms in float32, for small corpora."
        },
    )
    cache_frames: int = field(
        default=1, metadata={"help": "Frames per clip that cache_features disk stores, evenly spaced in the clip."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of the stored features, shared by all ranks; by default in the cache of datasets."},
    )

    # Augmentation of the spectrogram
    augmentation_noise: float = field(default=0.1, metadata={"help": "Maximum amplitude of uniform noise."})
    augmentation_roll: int | None = field(
        default=None, metadata={"help": "Maximum roll in time, in frames; all frames by default."}
    )
    augmentation_equaliser: float = field(
        default=0.0, metadata={"help": "Standard deviation of a random gain per mel bin, in normalised log-mel."}
    )

    def __post_init__(self):
        self.cache_features = FEATURE_CACHES.get(str(self.cache_features).lower(), self.cache_features)
        if self.cache_features not in FEATURE_CACHES:
            raise ValueError(f"cache_features: unknown value '{self.cache_features}'; choose none, disk or all.")
        if self.cache_frames < 1:
            raise ValueError(f"cache_frames: {self.cache_frames} frames per clip; give at least 1.")
        super().__post_init__()
        if self.streaming:
            # Each rank reads its own part of the stream. By default, the first rank reads for all.
            self.accelerator_config.dispatch_batches = False

    def augmentation(self, **others) -> Augmentation:
        """Return the `Augmentation` that these arguments describe; `others` sets its other fields."""
        options = {name: getattr(self, f"augmentation_{name}") for name in ("noise", "roll", "equaliser")}
        return Augmentation(**options, **others)


@dataclass
class CaptioningArguments(StageArguments):
    """Arguments of a stage that trains a captioner on captions."""

    sample_steps: int = field(
        default=0,
        metadata={
            "help": "Number of steps between two captions of a few fixed clips, which are logged and saved in "
            "samples.jsonl; 0 turns them off."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "sample_steps")


@dataclass
class PrefixArguments(CaptioningArguments):
    """Arguments of prefix tuning."""

    prompt: str = field(default=SOUND_PROMPT, metadata={"help": "Question that follows the prefix."})
    split: str = field(default="shots", metadata={"help": "Split with captioned images."})
    max_samples: int | None = field(default=16, metadata={"help": "Number of captioned images (shots)."})
    frame: int | None = field(
        default=None, metadata={"help": "Index of the frame to show; random in each epoch by default."}
    )


@dataclass
class AlignmentArguments(SoundArguments):
    """
    Arguments of the alignment: the objective, the optimizer and their schedules.
    """

    _VALID_DICT_FIELDS = [*SoundArguments._VALID_DICT_FIELDS, "objective_options"]

    # Objective
    objective: str = field(
        default="mmd", metadata={"help": "Name of the loss to minimise, a key of dali_llava.train.losses.LOSSES."}
    )
    objective_options: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the objective, as JSON: '{\"num_heads\": 4}'."}
    )

    schedule_epochs: int | None = field(
        default=None,
        metadata={"help": "Epochs of the objective's schedule in a run of max_steps; by default those of the data."},
    )
    transport_micro_batches: int = field(
        default=1,
        metadata={
            "help": "Parts of a batch, for ot and ot_att; the towers encode a part during the transport of another."
        },
    )

    # Input
    frame: int | None = field(
        default=None, metadata={"help": "Index of the frame to align with; by default a random frame in each epoch."}
    )

    # Log
    distance_steps: int = field(
        default=100,
        metadata={
            "help": "Number of steps between two measurements of the distance between the audio and the image tokens "
            "of 16 fixed clips; 0 turns them off."
        },
    )

    # Optimizer: the defaults are those of the reference implementation
    optim: str = field(
        default=COUPLED_ADAM,
        metadata={
            "help": "Optimizer: adam (weight decay is added to the gradient), or a value of optim in transformers."
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the audio tower."})
    objective_learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Constant learning rate of the objective's parameters, which have no weight decay."},
    )
    adam_beta1: float = field(default=0.95, metadata={"help": "Beta1 of Adam."})
    weight_decay: float = field(default=5e-7, metadata={"help": "Weight decay of the audio tower."})
    halve_from: float = field(default=10, metadata={"help": "Epoch at which the learning rate is first halved."})
    halve_every: float = field(
        default=0, metadata={"help": "Number of epochs between two halvings; 0 uses lr_scheduler_type instead."}
    )

    def __post_init__(self):
        self.objective_options = parse_options("objective_options", self.objective_options)
        names = [COUPLED_ADAM, *(each.value for each in OptimizerNames)]
        if self.optim not in names:
            raise ValueError(f"optim: unknown optimizer '{self.optim}'; known: {', '.join(names)}.")
        optim = self.optim
        if optim == COUPLED_ADAM:
            self.optim = OptimizerNames.ADAMW_TORCH  # `TrainingArguments` accepts only its own names
        super().__post_init__()
        if optim == COUPLED_ADAM:
            self.optim = optim
        check_not_negative(self, "distance_steps")


@dataclass
class AdapterArguments:
    """Arguments of a stage that can train LoRA adapters. Inherit from it beside `TrainingArguments`."""

    lora: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of the captioner to train with LoRA: language_model, audio_tower or both; default: none."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=16, metadata={"help": "The adapters are scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters' inputs."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt, such as q_proj; all linear layers of the parts by default."},
    )


@dataclass
class DistillationArguments(CaptioningArguments, AdapterArguments):
    """Arguments of the distillation: how the pseudo-captions are generated, and those of the training."""

    split: str = field(default="balanced", metadata={"help": "Split to caption and to train on."})
    prompt: str = field(default=SOUND_PROMPT, metadata={"help": "Question, for captioning and for training."})
    caption_temperature: float = field(default=0.2, metadata={"help": "Sampling temperature; 0 decodes greedily."})
    caption_max_new_tokens: int = field(default=128, metadata={"help": "Maximum number of tokens per caption."})
    caption_batch_size: int = field(default=16, metadata={"help": "Number of clips per captioning batch."})
    captions: str | None = field(
        default=None,
        metadata={"help": "Parquet file with captions of an earlier run to train on; by default, the model captions."},
    )


@dataclass
class PrefilterArguments(StageArguments):
    """Arguments of the pre-filter: its two models and which clips it keeps."""

    # Models
    captioner: str | None = field(default=None, metadata={"help": "Folder or Hub id of the image captioner."})
    prompt: str | None = field(
        default=None, metadata={"help": "Question to the captioner; the default depends on its type."}
    )
    caption_max_new_tokens: int = field(default=32, metadata={"help": "Maximum length of a caption, in tokens."})
    embedder: str | None = field(
        default=None, metadata={"help": "Language model that embeds texts; by default the captioner's own."}
    )
    embedder_kind: str = field(
        default="language_model",
        metadata={"help": "language_model, or sentence for sentence-transformers."},
    )
    layer: int = field(
        default=-1,
        metadata={"help": "Layer to average: 0 for word embeddings, -1 for the last one."},
    )

    # Choice
    frames: int = field(default=10, metadata={"help": "Maximum number of frames per clip, the first of each second."})
    keep: int | None = field(default=None, metadata={"help": "Number of clips to keep, the nearest first."})
    threshold: float | None = field(default=None, metadata={"help": "Keep the clips below this distance."})
    batch_size: int = field(default=16, metadata={"help": "Number of clips per captioning batch."})
