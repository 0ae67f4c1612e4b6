"""Schedules as pure functions of the step, and thin schedulers that write their values into an optimizer's groups:
1cycle with a long top and a final annihilation, and warm restarts with normalized weight decay (AdamWR, SGDWR)."""

from __future__ import annotations

from .recipes.one_cycle import ARTICLE, OneCycle, Phases, Strategy, anneal, one_cycle, one_cycle_momentum
from .recipes.restarts import Period, WarmRestarts, adamwr, cosine_restarts, normalized_decay, restart_period, sgdwr

__all__ = [
    "ARTICLE",
    "OneCycle",
    "Period",
    "Phases",
    "Strategy",
    "WarmRestarts",
    "adamwr",
    "anneal",
    "cosine_restarts",
    "normalized_decay",
    "one_cycle",
    "one_cycle_momentum",
    "restart_period",
    "sgdwr",
]
