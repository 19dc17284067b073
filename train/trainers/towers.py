"""Base of the models that train the audio tower with an objective, outside of the captioner."""

from torch import nn

from dali_llava.modeling import LlavaAudioTowers
from dali_llava.train.base_model import train_only


class TowerObjective(nn.Module):
    """
    The two towers, of which the audio tower trains, and an objective on its tokens.

    The objective is a submodule, so that its parameters (an attention, a temperature) are wrapped and gathered
    together with those of the audio tower.

    Args:
        towers: the towers. All weights except those of the audio tower are frozen.
        objective: a module that computes a loss.
    """

    def __init__(self, towers: LlavaAudioTowers, objective: nn.Module):
        super().__init__()
        self.towers, self.objective = towers, objective
        self.config = towers.config  # DeepSpeed reads the width of the model from it
        train_only(towers, towers.audio_tower)

    def train(self, mode: bool = True):
        super().train(mode)
        self.towers.vision_tower.eval()  # frozen: no dropout
        return self

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """See `PreTrainedModel.activation_checkpointing_enable`."""
        self.towers.audio_tower.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """The name of `activation_checkpointing_enable` in earlier versions of transformers."""
        self.towers.audio_tower.gradient_checkpointing_enable(**kwargs)
