"""Memory, floating-point operations and time of a stage, computed without allocating its model."""

from .device import check_memory
from .engines import ENGINES, Engine
from .plan import Plan, plan_stage
from .stage_model import StageModel


__all__ = ["ENGINES", "Engine", "Plan", "StageModel", "check_memory", "plan_stage"]
