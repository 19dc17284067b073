"""Base of the trainers of all stages: checkpoints with only the weights that the stage trains, on every engine."""

import shutil
import sys
from pathlib import Path
from shlex import join
from typing import Any

import torch
from accelerate.utils import gather_object, save_fsdp_optimizer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from dali_llava.modeling.pretrained_llava_audio import LlavaAudioPreTrainedModel
from dali_llava.modeling.stage_checkpoint import load_stage_weights
from dali_llava.train.data.collators import for_evaluation
from dali_llava.train.data.draws import DrawsEpoch
from dali_llava.train.engines import autocast_deepspeed, layer_classes, requested_engine
from dali_llava.train.trainers.checkpoints import replace_folder, write_manifest
from dali_llava.train.trainers.interruption import Interruption
from dali_llava.train.trainers.monitoring import StageProgress, StepMonitor
from dali_llava.train.trainers.objective import read_objective, write_objective
from dali_llava.train.trainers.weights import gather_weights, set_weights


TRAINER_STATE = "trainer_state.json"


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite."""


class StageMixin:
    """
    What the trainers of all stages add to a `transformers.Trainer`.

    - A stage is saved from the whole trained weights on every engine: the weights, the name of the base model and the
      processor. A checkpoint to resume from also contains the states of the optimizer, the scheduler and the random
      number generators. It is written to a temporary folder and renamed.
    - Training stops before an optimizer step if the loss is not finite, and after SIGTERM.

    Args:
        pretrained: the captioner or the part of it that is loaded; its trained weights are saved.
        stage: name of the stage, such as `align:mmd`.
    """

    def __init__(self, *args, pretrained: LlavaAudioPreTrainedModel, stage: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.pretrained, self.stage = pretrained, stage
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        self._batch_ids: list[str] = []
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StageProgress)
        self.remove_callback(PrinterCallback)
        self.monitor = StepMonitor()
        self.add_callback(self.monitor)
        if hasattr(self.data_collator, "draws"):
            self.add_callback(DrawsEpoch(self.data_collator.draws))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            autocast_deepspeed(self.accelerator.state.deepspeed_plugin)

    def train_and_save(self):
        """
        Train the stage, from `args.resume_from_checkpoint` if it is given, and save it.

        After SIGTERM, the stage is incomplete: there is a checkpoint to resume from, and nothing else is saved.
        """
        self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        if not self.interruption.requested:
            self.save_model()
        return self

    @property
    def broken_clips(self) -> int:
        """Number of clips that this rank could not open and replaced; see `ClipOpener`."""
        return self.data_collator.opener.broken if hasattr(self.data_collator, "opener") else 0

    def get_batch_samples(self, *args, **kwargs):
        self.monitor.start_step()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.monitor.count(batches)
        return batches, num_items

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as `Trainer.log` does, with the monitor's entry in training, and `broken_clips` if there are any."""
        if "loss" in logs:
            logs = {**self.monitor.entry(self.accelerator), **logs}
        super().log(logs | {"broken_clips": self.broken_clips} if self.broken_clips else logs, *args, **kwargs)

    def summary(self) -> str:
        """Return one line about the finished or interrupted stage. All ranks must call it."""
        broken = self.accelerator.reduce(torch.tensor(self.broken_clips, device=self.accelerator.device)).item()
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        line = f"{self.args.output_dir}: {self.stage}, {self.state.global_step} steps"
        line += f", last loss {losses[-1]:.4g}" if losses else ""
        line += f"; {broken} clips could not be opened and were replaced" if broken else ""
        if self.interruption.requested:
            line += f"; interrupted, resume with: accelerate launch {join(_without_resume(sys.argv))} "
            line += "--resume_from_checkpoint true"
        return line

    # Training

    def train(self, *args, **kwargs):
        """See `Trainer.train`. SIGTERM ends training after the current step; see `Interruption`."""
        with self.interruption.listening():
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True  # resumed from the last checkpoint of a complete run

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self._batch_ids = list(inputs.pop("id", ()))
        return super()._prepare_inputs(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """
        See `Trainer.training_step`.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite on any rank. The weights are those of the step before.
            ValueError: the loss rejects the batch. The message names the step and the clips.
        """
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except ValueError as error:
            rank = f", rank {self.args.process_index}" if self.args.world_size > 1 else ""
            raise ValueError(f"step {self.state.global_step + 1}{rank}: {error}{_clips(self._batch_ids)}") from error
        finite = torch.isfinite(loss).all()
        if self.accelerator.reduce(finite.int(), reduction="sum").item() < self.args.world_size:
            self._stop_at(loss, bool(finite))
        return loss

    def _stop_at(self, loss: torch.Tensor, finite: bool) -> None:
        found = gather_object([None if finite else (self.args.process_index, loss.item(), self._batch_ids)])
        broken = [each for each in found if each is not None]
        ranks = f" on rank {', '.join(str(rank) for rank, *_ in broken)}" if self.args.world_size > 1 else ""
        ids = [name for *_, names in broken for name in names]
        raise NonFiniteLossError(
            f"step {self.state.global_step + 1}: the loss is {broken[0][1]}{ranks}{_clips(ids)}; checkpoints in "
            f"{self.args.output_dir} are kept. Inspect these clips, or lower learning_rate."
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """See `Trainer.get_eval_dataloader`. The batches are the same at each evaluation and are not augmented."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        training, self.data_collator = self.data_collator, for_evaluation(self.data_collator, rows)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach().mean(), None, None

    def _finalize_training(self, *args, **kwargs):
        best = self.state.best_model_checkpoint
        if self.interruption.requested:  # keep the weights and the checkpoint of the last step
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the stage in `output_dir`. All ranks must call it."""
        self._release_gathered_weights()
        whole = self.args.base_model is None  # the first stage trains a complete captioner
        weights = gather_weights(self.pretrained, keep=self.args.should_save, frozen=whole)
        objective = getattr(self.model, "objective", nn.Identity())
        extra = gather_weights(objective, keep=self.args.should_save)
        if self.args.should_save:
            write_objective(Path(output_dir or self.args.output_dir), objective, extra)
            self._save(output_dir, weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir
        if self.args.base_model is None:
            self.pretrained.save_pretrained(folder, state_dict=state_dict)
        else:
            self.pretrained.save_stage(folder, base=self.args.base_model, stage=self.stage, weights=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        args = self.args
        self.store_flos()
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = folder.with_name(f".{folder.name}")
        if args.should_save:
            for left in folder.parent.glob(f".{PREFIX_CHECKPOINT_DIR}-*"):  # by a run that was killed
                shutil.rmtree(left)
        self.accelerator.wait_for_everyone()
        self.save_model(str(unfinished), _internal_call=True)
        if not args.save_only_model:
            self._save_optimizer_and_scheduler(str(unfinished))
            self._save_scaler(str(unfinished))
            self._save_rng_state(str(unfinished))
        if self.state.best_global_step:
            best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == folder or best.exists():
                self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            self._export_callback_states()
            self.state.save_to_json(str(unfinished / TRAINER_STATE))
            write_manifest(unfinished, args, self.stage, requested_engine(args))
            replace_folder(unfinished, folder)
            rotate_checkpoints(args.output_dir, args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _export_callback_states(self) -> None:
        states: dict[str, list] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        for name, found in states.items():
            self.state.stateful_callbacks[name] = found if len(found) > 1 else found[0]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The weights of an engine's checkpoint would include the frozen ones, which the base model already has.
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    # Resuming

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None):
        self.model._no_split_modules = layer_classes(self.model)
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)  # no frozen weights
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared

    def _release_gathered_weights(self) -> None:
        """Let each rank have its shards only. The optimizer's state belongs to them, and weights are set in them."""
        # ZeRO-3 gathers weights in advance. Those that a step has not used are still in flight.
        if hasattr(self.model_wrapped, "empty_partition_cache"):
            self.model_wrapped.empty_partition_cache()
        # FSDP2 shards the root's weights after a backward pass, which an evaluation does not have.
        for module in self.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._release_gathered_weights()
        folder = Path(resume_from_checkpoint)
        whole = self.args.base_model is None
        weights = load_file(folder / SAFE_WEIGHTS_NAME) if whole else load_stage_weights(folder)
        set_weights(self.pretrained, self.pretrained.own_names(weights))
        set_weights(getattr(self.model, "objective", nn.Identity()), read_objective(folder))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class StageTrainer(StageMixin, Trainer):
    """Trainer of a stage; see `StageMixin`."""


def _clips(ids: list[str], most: int = 8) -> str:
    """`; clips a, b` for an error message, with at most `most` names."""
    if not ids:
        return ""
    return f"; clips {', '.join(map(str, ids[:most]))}" + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _without_resume(words: list[str]) -> list[str]:
    """The command-line words without `--resume_from_checkpoint VALUE`."""
    if "--resume_from_checkpoint" not in words:
        return words
    index = words.index("--resume_from_checkpoint")
    return words[:index] + words[index + 2 :]
