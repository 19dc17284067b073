"""Supervised fine-tuning with the `SFTTrainer` of TRL: its arguments and its trainer. Needs the extra `trl`."""

from dataclasses import MISSING, dataclass, field, fields, make_dataclass

from transformers import TrainingArguments

from dali_llava.processing.processing_llava_audio import SOUND_PROMPT
from dali_llava.train.arguments import AdapterArguments, CaptioningArguments

from .samples import SampleCaptions
from .stage import StageMixin


try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        f'supervised fine-tuning needs trl, which cannot be imported ({error}); run pip install "dali-llava[trl]".'
    ) from error


# Of the fields that `SFTConfig` adds to `TrainingArguments`, those that are arguments of the stage. The others
# describe the preparation of a text dataset, which the collator replaces.
OFFERED = ("loss_type", "activation_offloading")
FIXED = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False}


def _fixed_fields() -> list[tuple]:
    """The other fields of `SFTConfig`, with fixed values."""
    fixed = []
    for each in fields(SFTConfig):
        if each.name not in {*OFFERED, *(own.name for own in fields(TrainingArguments))}:
            value = FIXED.get(each.name, None if each.default is MISSING else each.default)
            fixed.append((each.name, each.type, field(init=False, default_factory=lambda value=value: value)))
    return fixed


_FixedArguments = make_dataclass("_FixedArguments", _fixed_fields())


@dataclass
class SupervisedArguments(CaptioningArguments, AdapterArguments, _FixedArguments, SFTConfig):
    """Arguments of the supervised fine-tuning: its samples, the parts that it trains, and `loss_type` of TRL."""

    # Corpus
    split: str = field(default="train", metadata={"help": "Split with captions to train on."})
    prompt: str = field(default=SOUND_PROMPT, metadata={"help": "Question that the captions answer."})
    modalities: list[str] = field(
        default_factory=lambda: ["audio"],
        metadata={
            "help": "What the question is asked about: audio, image or audiovisual. With several, one of them is "
            "drawn per clip and epoch, among those whose media the clip has."
        },
    )
    frame: int | None = field(
        default=None, metadata={"help": "Index of the frame to show; random in each epoch by default."}
    )

    # Model
    train_parts: list[str] = field(
        default_factory=lambda: ["audio_projector"],
        metadata={
            "help": "Parts of the captioner to train in full: audio_projector, audio_tower, multi_modal_projector, "
            "language_model or prefix."
        },
    )


class SupervisedTrainer(StageMixin, SFTTrainer):
    """Minimises TRL's loss of the answers in batches of `SupervisedCollator`, and logs `mean_token_accuracy`."""

    def __init__(self, model, **kwargs):
        super().__init__(model=model, pretrained=model, **kwargs)
        if self.args.sample_steps:
            self.add_callback(SampleCaptions(self, self.args.sample_steps))

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report each run to the Hub."""
