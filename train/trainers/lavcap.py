"""LAVCap: captions from fused audio and image tokens, with a loss between the tokens of both encoders."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ModelOutput

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.train.arguments import AdapterArguments, CaptioningArguments, check_not_negative, parse_options
from dali_llava.train.data.collators import IGNORED
from dali_llava.train.losses import TokenAssignmentLoss

from .samples import SampleCaptions
from .stage import StageTrainer


@dataclass
class LavcapArguments(CaptioningArguments, AdapterArguments):
    """Arguments of LAVCap: the fusion, the prompt, the loss between the tokens, and the parts that it trains."""

    _VALID_DICT_FIELDS = [*CaptioningArguments._VALID_DICT_FIELDS, "fusion_options", "ot_options"]

    # Samples
    modalities: list[str] = field(
        default_factory=lambda: ["audiovisual"],
        metadata={
            "help": "What the captions are generated from: audio or audiovisual. With both, one of them is drawn per "
            "clip and epoch, among those whose media the clip has."
        },
    )
    frame: int | None = field(
        default=None,
        metadata={"help": "Index of the frame to show; by default a random one, or the clip's frames for a video."},
    )
    prompt: str = field(
        default="I", metadata={"help": "Prompt of LAVCap: I (audio), II (content) or III (audio and visual apart)."}
    )
    audio_tag: str = field(
        default="Audio",
        metadata={"help": "Name of the tag around the tokens in prompt I, and around the audio tokens in prompt III."},
    )
    varied_requests: bool = field(
        default=True, metadata={"help": "Draw one of eight wordings of the request per clip and epoch."}
    )
    longest_caption: int = field(default=256, metadata={"help": "Number of tokens to which captions are cut."})
    mask_mels: int = field(default=0, metadata={"help": "Limit of the mel bins that SpecAugment masks; 0 for none."})
    mask_frames: int = field(default=0, metadata={"help": "Limit of the frames that SpecAugment masks; 0 for none."})

    # Fusion
    fusion: str | None = field(
        default=None,
        metadata={"help": "Name of a fusion, such as ot_attention; by default, that of the base model."},
    )
    fusion_options: dict | str | None = field(
        default=None, metadata={"help": "Options of the fusion, as JSON: '{\"rescale\": true}'."}
    )

    # Loss
    ot_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss between audio and image tokens; 0 turns it off."}
    )
    ot_options: dict | str | None = field(
        default=None, metadata={"help": "Options of TokenAssignmentLoss, as JSON: '{\"rescale\": true}'."}
    )
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing of the cross-entropy."})

    # Parts
    train_parts: list[str] = field(
        default_factory=lambda: ["audio_projector", "fusion"],
        metadata={
            "help": "Parts of the captioner to train in full: audio_projector, fusion, audio_tower, "
            "multi_modal_projector, language_model or prefix."
        },
    )

    # Captioning with the trained model
    num_beams: int = field(default=4, metadata={"help": "Number of beams of the trained model's beam search."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest caption of the trained model, in tokens."})

    def __post_init__(self):
        self.fusion_options = parse_options("fusion_options", self.fusion_options)
        self.ot_options = parse_options("ot_options", self.ot_options)
        super().__post_init__()
        check_not_negative(self, "ot_weight", "mask_mels", "mask_frames")
        for name in ("longest_caption", "num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor must be at least 0 and less than 1, not {self.label_smoothing_factor}."
            )


@dataclass
class LavcapOutput(ModelOutput):
    """
    Output of `LavcapModel`.

    Attributes:
        loss: `caption_loss + ot_weight * assignment_loss`.
        caption_loss: mean cross-entropy over the tokens of the answers.
        num_tokens: number of these tokens.
        assignment_loss: mean over the samples of the loss between their tokens, which is 0 for a sample of one
            modality; None without an objective.
        logs: `assignment_loss`, and the `scale` of the objective.
    """

    loss: torch.Tensor | None = None
    caption_loss: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    assignment_loss: torch.Tensor | None = None
    logs: dict | None = None


class LavcapModel(nn.Module):
    """
    A captioner with a fusion, and an objective between its audio and image tokens [1, equation 9].

    One forward pass of the captioner gives the logits of the answers and, before the fusion, the tokens of both
    modalities. The objective is a submodule, so that its parameters are wrapped and gathered with those of the
    captioner.

    Args:
        captioner: the captioner. What it trains has `requires_grad`.
        objective: the loss between the tokens, or None for the cross-entropy alone.
        ot_weight: weight of the objective.
        label_smoothing: share of the uniform distribution over the vocabulary in the target of each token.

    References:
        [1] K. Rho, H. Lee, V. Iverson and J. S. Chung, "LAVCap: LLM-based Audio-Visual Captioning using Optimal
            Transport", ICASSP, 2025.
    """

    def __init__(
        self,
        captioner: LlavaAudioForConditionalGeneration,
        objective: TokenAssignmentLoss | None = None,
        ot_weight: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.captioner = captioner
        self.config = captioner.config  # DeepSpeed reads the width of the model from it
        if objective is not None:
            self.objective = objective
        self.ot_weight = ot_weight
        self.label_smoothing = label_smoothing

    def forward(self, labels: torch.LongTensor, **inputs) -> LavcapOutput:
        """
        Compute the loss of a batch.

        Args:
            labels: (B, L), the target tokens; -100 at ignored positions.
            inputs: other arguments of the captioner's forward.
        """
        outputs = self.captioner(**inputs)
        targets = labels[:, 1:].flatten()
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        caption_loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=self.label_smoothing)
        found = LavcapOutput(loss=caption_loss, caption_loss=caption_loss, num_tokens=(targets != IGNORED).sum())
        if not hasattr(self, "objective"):
            return found
        pairs, share = outputs.fusion_inputs, 0.0
        if pairs is not None:
            share, pairs = len(pairs.audio_tokens) / len(labels), pairs.to_tuple()
        else:
            # On every rank, the objective's parameters need a gradient, and the backward pass must reach each module
            # through the same number of outputs: ZeRO-3 gathers weights in the same order on all ranks.
            token = 1 + 0 * outputs.audio_hidden_states[None, :1].float()
            pairs = token, token
        output = self.objective(*pairs)
        found.assignment_loss = share * output.loss
        found.logs = {"assignment_loss": found.assignment_loss.detach(), "scale": output.logs["scale"]}
        found.loss = caption_loss + self.ot_weight * found.assignment_loss
        return found

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """See `PreTrainedModel.activation_checkpointing_enable`."""
        self.captioner.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """The name of `activation_checkpointing_enable` in earlier versions of transformers."""
        self.captioner.gradient_checkpointing_enable(**kwargs)


class LavcapTrainer(StageTrainer):
    """
    Trainer of a `LavcapModel`. The objective's parameters are saved beside the stage; see `write_objective`.

    Args:
        model: the captioner and the objective.
        kwargs: arguments of `StageTrainer`.
    """

    def __init__(self, model: LavcapModel, **kwargs):
        super().__init__(model=model, pretrained=model.captioner, **kwargs)
        self.loss_is_scaled_for_ga = True
        if self.args.sample_steps:
            self.add_callback(SampleCaptions(self, self.args.sample_steps))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See `Trainer.get_decay_parameter_names`, which excludes norms and biases. The temperature does not decay."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.startswith("objective.")]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The loss of a batch. In training, it is the part of the step's loss that this batch contributes: the mean over
        the tokens of all batches and ranks, and the mean of the objective over their samples.
        """
        output = model(**inputs)
        loss = output.loss
        if num_items_in_batch is not None:
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = output.caption_loss * output.num_tokens * ranks / num_items_in_batch
            self.monitor.add({"caption_loss": loss})
            if output.assignment_loss is not None:
                batches = self.current_gradient_accumulation_steps
                loss = loss + self.model.ot_weight * output.assignment_loss / batches
                self.monitor.add(output.logs, scale=1 / batches)
        return (loss, output) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        self.pretrained.generation_config.save_pretrained(output_dir or self.args.output_dir)
