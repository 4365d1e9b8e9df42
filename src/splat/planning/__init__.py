"""Planning: devices, costs, schedules, and the printable plan."""

from splat.planning.cost import CostModel, cost_model
from splat.planning.parts import parts_of
from splat.planning.plan import (
    SCHEDULES,
    Candidate,
    Plan,
    Problem,
    check_blocks,
    check_problem,
    make_plan,
    model_of,
    predict_ms,
)
from splat.planning.savings import Savings, savings
from splat.planning.schedule import Pass, PassDecision, Schedule, build_schedule, schedule
from splat.planning.target import TARGETS, Target, find

__all__ = [
    "SCHEDULES",
    "TARGETS",
    "Candidate",
    "CostModel",
    "Pass",
    "PassDecision",
    "Plan",
    "Problem",
    "Savings",
    "Schedule",
    "Target",
    "build_schedule",
    "check_blocks",
    "check_problem",
    "cost_model",
    "find",
    "make_plan",
    "model_of",
    "parts_of",
    "predict_ms",
    "savings",
    "schedule",
]
