"""The optimizers of the study of all optimizers, and the start points of the search for their lr and decay."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

import fused_optim as fo
from fused_optim import groups

WARMUP = 0.1  # share of the steps
CLIP = 1.0  # maximum gradient norm, for all

Build = Callable[[nn.Module, float, float, int], Optimizer]


@dataclass(frozen=True)
class Entrant:
    """An optimizer of the study. build: from model, lr, decay and number of steps. lr: start points of the search by
    task. decay: start point of the search. scheduled: whether lr follows the schedule."""

    name: str
    build: Build
    lr: dict[str, float]
    decay: float = 0.1
    scheduled: bool = True


def plain(cls: Callable[..., Optimizer], **options: Any) -> Build:
    """Builds the class with its defaults, save for these options."""
    return lambda model, lr, decay, steps: cls(
        model.parameters(), lr=lr, weight_decay=decay, max_grad_norm=CLIP, **options
    )


def schedule_free(cls: Callable[..., Optimizer]) -> Build:
    """No schedule; the optimizer's own warm-up."""
    return lambda model, lr, decay, steps: cls(
        model.parameters(), lr=lr, weight_decay=decay, max_grad_norm=CLIP, warmup_steps=round(WARMUP * steps)
    )


def ademamix(model: nn.Module, lr: float, decay: float, steps: int) -> Optimizer:
    """The slow average of the paper spans 10,000 steps. The runs here have hundreds, so it spans 100."""
    warm: dict[str, Any] = {"alpha_warmup": steps, "beta3_warmup": steps}
    params, betas = model.parameters(), (0.9, 0.999, 0.99)
    return fo.FusedAdEMAMix(params, lr=lr, betas=betas, weight_decay=decay, max_grad_norm=CLIP, **warm)


def muon(normuon: bool) -> Build:
    """One lr and decay for both halves: "match_rms_adamw" gives Muon's updates the size of AdamW's."""

    def build(model: nn.Module, lr: float, decay: float, steps: int) -> Optimizer:
        split = groups.muon(model, flatten=True)
        return fo.FusedMuon(
            split,
            lr=lr,
            weight_decay=decay,
            adamw_lr=lr,
            adamw_weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
            normuon=normuon,
            max_grad_norm=CLIP,
        )

    return build


def corrected(model: nn.Module, lr: float, decay: float, steps: int) -> Optimizer:
    """All layers but the output layer are corrected, as in the paper."""
    heads = {param for head in groups.output_layers(model) for param in head.parameters()}
    body = [param for param in model.parameters() if param not in heads]
    split = [{"params": body, "corrected_decay": True}, {"params": list(heads)}]
    return fo.FusedAdamW(split, lr=lr, weight_decay=decay, max_grad_norm=CLIP)


ADAM = {"digits": 3e-3, "gpt": 3e-3}

ENTRANTS = {
    entrant.name: entrant
    for entrant in (
        Entrant("AdamW", plain(fo.FusedAdamW), ADAM),
        Entrant("SGD momentum", plain(fo.FusedSGD, momentum=0.9), {"digits": 0.1, "gpt": 1.0}, 1e-4),
        Entrant("Lion", plain(fo.FusedLion), {"digits": 3e-4, "gpt": 3e-4}, 1.0),
        Entrant("QHAdamW", plain(fo.FusedQHAdamW), ADAM),
        Entrant("LAMB", plain(fo.FusedLAMB), {"digits": 1e-2, "gpt": 1e-2}, 1e-2),
        Entrant("NAdamW", plain(fo.FusedNAdam, decoupled_weight_decay=True), ADAM),
        Entrant("RAdamW", plain(fo.FusedRAdam, decoupled_weight_decay=True), ADAM),
        Entrant(
            "ScheduleFreeAdamW", schedule_free(fo.FusedScheduleFreeAdamW), {"digits": 1e-2, "gpt": 1e-2}, 0.1, False
        ),
        Entrant("ScheduleFreeSGD", schedule_free(fo.FusedScheduleFreeSGD), {"digits": 1.0, "gpt": 3.0}, 1e-4, False),
        Entrant("AdEMAMix", ademamix, ADAM),
        Entrant("ADOPT", plain(fo.FusedADOPT, decouple=True), ADAM),
        Entrant("Adan", plain(fo.FusedAdan), {"digits": 1e-2, "gpt": 1e-2}),
        Entrant("StableAdamW", plain(fo.FusedStableAdamW), ADAM),
        Entrant("Muon", muon(False), ADAM),
        Entrant("NorMuon", muon(True), ADAM),
        Entrant("AdamW cautious_decay", plain(fo.FusedAdamW, cautious_decay=True), ADAM),
        Entrant("AdamW corrected_decay", corrected, ADAM),
    )
}
# The option is newer than the study's other optimizers.
if "cautious" in inspect.signature(fo.FusedAdamW).parameters:
    ENTRANTS["AdamW cautious"] = Entrant("AdamW cautious", plain(fo.FusedAdamW, cautious=True), ADAM)


def factor(step: int, steps: int) -> float:
    """The schedule: lr relative to its peak at a step, counted from 0. A linear warm-up, then linear to 0."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm + 1)
