"""Losses between a sample's audio tokens and its image tokens, one file per objective."""

from dali_llava.train.losses.assignment import TokenAssignmentLoss
from dali_llava.train.losses.attentive import AlignmentAttention, AttentiveTransportLoss
from dali_llava.train.losses.base import AlignmentLoss, LossOutput
from dali_llava.train.losses.contrastive import ContrastiveLoss
from dali_llava.train.losses.mmd import MMDLoss
from dali_llava.train.losses.transport import TransportLoss


# The names that `--objective` accepts.
LOSSES: dict[str, type[AlignmentLoss]] = {
    "contrastive": ContrastiveLoss,
    "mmd": MMDLoss,
    "ot": TransportLoss,
    "ot_att": AttentiveTransportLoss,
    "token_assignment": TokenAssignmentLoss,
}


def register_objective(name: str, objective: type[AlignmentLoss]) -> None:
    """
    Make a loss available as `--objective NAME`. A module that `--plugins` names calls this when it is imported.

    Args:
        objective: a subclass of `AlignmentLoss`, built by its `from_captioner`.

    Raises:
        TypeError: not a subclass of `AlignmentLoss`.
        ValueError: the name belongs to another objective.

    Example:

    ```python
    >>> from dali_llava.train.losses import LOSSES, MMDLoss, register_objective

    >>> class HalfMMDLoss(MMDLoss):
    ...     def compute(self, *tokens_and_masks):
    ...         output = super().compute(*tokens_and_masks)
    ...         output.loss = output.loss / 2
    ...         return output

    >>> register_objective("half_mmd", HalfMMDLoss)
    >>> LOSSES.pop("half_mmd").__name__
    'HalfMMDLoss'

    ```
    """
    if not (isinstance(objective, type) and issubclass(objective, AlignmentLoss)):
        raise TypeError(f"objective {name}: {objective!r} is not a subclass of AlignmentLoss.")
    if LOSSES.setdefault(name, objective) is not objective:
        raise ValueError(f"objective {name}: {LOSSES[name].__name__} has this name; choose another name.")


__all__ = [
    "LOSSES",
    "AlignmentAttention",
    "AlignmentLoss",
    "AttentiveTransportLoss",
    "ContrastiveLoss",
    "LossOutput",
    "MMDLoss",
    "TokenAssignmentLoss",
    "TransportLoss",
    "register_objective",
]
