"""Base trainer of all stages, whose checkpoint contains only the weights that the stage trained."""

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dali_llava.modeling.modeling_llava_audio import LlavaAudioPreTrainedModel


class StageProgress(ProgressCallback):
    """Progress bar on stderr with the last loss; stdout is reserved for results."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.4g}" for name in ("loss", "eval_loss") if name in logs}
            self.training_bar.set_postfix(shown)


class StageTrainer(Trainer):
    """
    Trainer that saves a stage: the trained weights, the name of the base model, and the processor.

    Args:
        pretrained: the captioner or the part of it that is loaded; its trained weights are saved.
        stage: name of the stage, such as `align:mmd`.
    """

    def __init__(self, *args, pretrained: LlavaAudioPreTrainedModel, stage: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.pretrained, self.stage = pretrained, stage
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StageProgress)
        self.remove_callback(PrinterCallback)

    def train_and_save(self) -> "StageTrainer":
        """Train the stage, from `args.resume_from_checkpoint` if it is given, and save it."""
        self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        self.save_model()
        return self

    @property
    def broken_clips(self) -> int:
        """Number of clips that this rank could not open and replaced; see `ClipOpener`."""
        return self.data_collator.opener.broken if hasattr(self.data_collator, "opener") else 0

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as `Trainer.log` does, with `broken_clips` if there are any."""
        super().log(logs | {"broken_clips": self.broken_clips} if self.broken_clips else logs, *args, **kwargs)

    def summary(self) -> str:
        """Return one line about the finished stage. All ranks must call it."""
        broken = self.accelerator.reduce(torch.tensor(self.broken_clips, device=self.accelerator.device)).item()
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        line = f"{self.args.output_dir}: {self.stage}, {self.state.global_step} steps"
        line += f", last loss {losses[-1]:.4g}" if losses else ""
        return line + (f"; {broken} clips could not be opened and were replaced" if broken else "")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:  # `_save` is called on every rank
            return
        output_dir = output_dir or self.args.output_dir
        if self.args.base_model is None:  # the first stage trains a complete captioner
            self.pretrained.save_pretrained(output_dir)
        else:
            self.pretrained.save_stage(output_dir, base=self.args.base_model, stage=self.stage)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
