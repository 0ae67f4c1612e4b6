"""Registers the optimizers of this package with timm."""

from __future__ import annotations

import importlib
from typing import Any

import fused_optim

from ..optim.base import FusedOptimizer


def register_timm(registry: Any = None) -> list[str]:
    """Registers every optimizer of this package with timm, for timm.optim.create_optimizer_v2 and timm's scripts. The
    names are "fused-optim-adamw" and so on. (timm's "fusedadamw" is Apex's optimizer. timm reads an underscore in a
    name as a request for Lookahead.)

    Args:
        registry: a timm.optim.OptimizerRegistry. None: the registry of create_optimizer_v2, which has no public name in
            timm.

    Returns:
        The registered names.

    Raises:
        ImportError: timm is not installed, or older than 1.0.12, the first version with a registry.
    """
    try:
        optim = importlib.import_module("timm.optim")
        registry = registry or importlib.import_module("timm.optim._optim_factory").default_registry
        info = optim.OptimInfo
    except (ImportError, AttributeError) as error:
        raise ImportError("register_timm needs timm 1.0.12 or newer: pip install 'timm>=1.0.12'") from error
    names = []
    for kind in vars(fused_optim).values():
        if not (isinstance(kind, type) and issubclass(kind, FusedOptimizer) and kind is not FusedOptimizer):
            continue
        if kind.rule.orthogonal:  # timm's factory does not split a model into matrices and other params
            continue
        options = {key for key, *_ in kind.rule.columns}
        names.append(f"fused-optim-{kind.__name__.removeprefix('Fused').lower()}")
        registry.register(
            info(
                name=names[-1],
                opt_class=kind,
                description=f"fused_optim.{kind.__name__}: one fused step for all params",
                has_eps="eps" in options,
                has_momentum="momentum" in options,
                has_betas="betas" in options,
            )
        )
    return names
