"""Losses between a sample's audio tokens and its image tokens, one file an objective."""

from dali_llava.train.losses.assignment import TokenAssignmentLoss
from dali_llava.train.losses.assignment_prediction import AssignmentPredictionLoss
from dali_llava.train.losses.attentive import AlignmentAttention, AttentiveTransportLoss
from dali_llava.train.losses.base import AlignmentLoss, LossOutput
from dali_llava.train.losses.contrastive import ContrastiveLoss
from dali_llava.train.losses.mmd import MMDLoss
from dali_llava.train.losses.transport import TransportLoss


# What a training configuration may name as its objective.
LOSSES: dict[str, type[AlignmentLoss]] = {
    "contrastive": ContrastiveLoss,
    "mmd": MMDLoss,
    "ot": TransportLoss,
    "ot_att": AttentiveTransportLoss,
}

__all__ = [
    "LOSSES",
    "AlignmentAttention",
    "AlignmentLoss",
    "AssignmentPredictionLoss",
    "AttentiveTransportLoss",
    "ContrastiveLoss",
    "LossOutput",
    "MMDLoss",
    "TokenAssignmentLoss",
    "TransportLoss",
]
