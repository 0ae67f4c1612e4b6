"""Checkpoints that fused_optim.convert refuses: of optimizers without a counterpart, of training engines, of other
libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make_params, train
from foreign import ApexAdam, ApexSGD, DeepSpeedCPUAdam, DeepSpeedLion, build_theirs, package

from fused_optim import convert


def stepped(make: Callable[[list[Any]], Any], **layout: Any) -> dict[str, Any]:
    params = [torch.nn.Parameter(p.detach().contiguous(**layout)) for p in make_params([(2, 3, 4, 5)])]
    theirs = make(params)
    train([theirs], 1)
    return theirs.state_dict()


def altered(kind: Any, **options: Any) -> dict[str, Any]:
    saved = stepped(kind)
    saved["param_groups"][0].update(options)
    return saved


def optimis(name: str) -> dict[str, Any]:
    return stepped(lambda params: getattr(package("optimi"), name)(params, lr=0.01, triton=False))


ALL = [convert.apex, convert.deepspeed, convert.optimi, convert.bitsandbytes]
OTHERS: dict[str, tuple[Any, Callable[[], Any], str]] = {
    "apex no bias correction": (
        convert.apex,
        lambda: altered(ApexAdam, bias_correction=False),
        "bias_correction=False",
    ),
    "apex LARS": (convert.apex, lambda: altered(ApexSGD, trust_coefficient=0.1), "Apex's FusedLARS"),
    "apex NovoGrad": (convert.apex, lambda: altered(ApexAdam, norm_type=2), "Apex's FusedNovoGrad"),
    "apex Adagrad": (convert.apex, lambda: stepped(torch.optim.Adagrad), r"no counterpart here: \['sum'\]"),
    "deepspeed": (convert.deepspeed, lambda: altered(DeepSpeedCPUAdam, bias_correction=False), "correct it"),
    "no counts": (convert.apex, lambda: {**stepped(DeepSpeedLion), "state": {0: {"exp_avg": 0}}}, 'must have a "step"'),
    "StableAdamW": (convert.optimi, lambda: optimis("StableAdamW"), "eps_sq"),
    "Adan": (convert.optimi, lambda: optimis("Adan"), "exp_avg_diff"),
    "Ranger": (convert.optimi, lambda: optimis("Ranger"), "la_param"),
    "torch's": (convert.optimi, lambda: stepped(torch.optim.AdamW), "of optimi known here.*'decouple_lr'"),
    "torch's too": (convert.bitsandbytes, lambda: stepped(torch.optim.SGD), "of bitsandbytes known here.*'betas'"),
    "AdEMAMix": (convert.bitsandbytes, lambda: stepped(lambda p: build_theirs("AdEMAMix", p)), "AdEMAMix"),
    "RMSprop": (convert.bitsandbytes, lambda: stepped(lambda p: build_theirs("RMSprop", p)), "RMSprop or Adagrad"),
    "LAMB": (convert.bitsandbytes, lambda: stepped(lambda p: build_theirs("LAMB", p)), "unorm_vec"),
    "order": (
        convert.bitsandbytes,
        lambda: stepped(lambda p: build_theirs("AdamW", p), memory_format=torch.channels_last),
        "is not contiguous",
    ),
}


@pytest.mark.filterwarnings("ignore:.*LAMB")
@pytest.mark.parametrize("case", OTHERS)
def test_other_optimizers(case: str) -> None:
    converter, make, message = OTHERS[case]
    saved = make()
    with pytest.raises(ValueError, match=message):
        converter(saved)


@pytest.mark.parametrize("converter", ALL)
def test_checkpoints_of_engines(converter: Callable[[Any], Any]) -> None:
    engines = {"optimizer_state_dict": {"state": {}, "param_groups": []}, "fp32_groups_flat": [torch.zeros(3)]}
    with pytest.raises(ValueError, match=r"must be a dict with .*fp32_groups_flat.*gathered by param first"):
        converter(engines)
