"""What the stages share that train the audio tower: how they read sounds, and change them."""

from dataclasses import dataclass, field

from dali_llava.train.augmentation import Augmentation

from .stage import StageArguments


@dataclass
class SoundArguments(StageArguments):
    """
    Arguments of a stage that trains the audio tower: how the corpus is read, and the augmentation of spectrograms.
    """

    # Input
    streaming: bool = field(
        default=False, metadata={"help": "Read the corpus while training, again and again, for max_steps."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows of a stream, of which one is drawn at a time."})
    cache_features: bool = field(
        default=False,
        metadata={"help": "Compute spectrograms and image tokens once, onto disk: a small corpus, many epochs."},
    )

    # Augmentation of the spectrogram
    augmentation_noise: float = field(default=0.1, metadata={"help": "Noise of amplitude U(0, this)."})
    augmentation_roll: int | None = field(
        default=None, metadata={"help": "Roll by up to so many frames; default all."}
    )
    augmentation_equaliser: float = field(
        default=0.0, metadata={"help": "Random gain at each mel bin: its deviation, of normalised log-mel."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.streaming:
            # Each rank reads its own part of the stream; by default the first one would read for all.
            self.accelerator_config.dispatch_batches = False

    def augmentation(self, **others) -> Augmentation:
        """What these arguments say of the augmentation, and `others` of `Augmentation`'s."""
        options = {name: getattr(self, f"augmentation_{name}") for name in ("noise", "roll", "equaliser")}
        return Augmentation(**options, **others)
