"""Converts checkpoints of other libraries' optimizers:

    optimizer.load_state_dict(convert.apex(checkpoint["optimizer"]))

Every function takes the state_dict of the other optimizer and returns a new dict in torch's format. It does not change
its argument. States keep their dtype. Tensors that need no arithmetic are shared with the argument, which saves memory.
As with torch's checkpoints, further training writes into them.

Group options get the names that the corresponding class uses (see docs/migration.md). Other options, for example
"initial_lr" and "name", stay. Options that a library does not save must be given to the constructor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.ema import EMA, STEPS
from ..engine.masters import LOW
from ..engine.state_formats import ANCHOR, decoded

Options = dict[str, Any]
State = dict[str, Any]

STATES = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer", EMA, LOW)
COUNTS = (STEPS, "skipped_steps")  # counts of the whole optimizer that checkpoints of this package can have


def apex(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Converts a checkpoint of NVIDIA Apex's FusedAdam, FusedSGD or FusedLAMB. Load it into FusedAdamW (FusedAdam if it
    was made with adam_w_mode=False), FusedSGD or FusedLAMB.

    Apex counts steps per group. Every param of a group gets the group's count.

    Args:
        state_dict: state_dict of Apex's optimizer.

    Raises:
        ValueError: the checkpoint is of another optimizer, or of an Adam with bias_correction=False.

    Source: apex/optimizers/fused_adam.py, fused_sgd.py and fused_lamb.py.
    """

    def convert(group: Options, states: list[State]) -> tuple[Options, list[State]]:
        for key, other in (("trust_coefficient", "FusedLARS"), ("norm_type", "FusedNovoGrad")):
            if key in group:
                raise ValueError(f"the checkpoint is of Apex's {other}, which has no counterpart here")
        if "max_grad_norm" not in group:  # not LAMB: FusedLAMB has an option bias_correction
            group = _with_bias_correction(group)
        if "momentum" in group:
            return group, states
        return _without(group, "step"), [{**state, "step": _step(state, group)} for state in states]

    return _converted(state_dict, "Apex", convert)


def deepspeed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Converts a checkpoint of DeepSpeed's FusedAdam, DeepSpeedCPUAdam, FusedLamb, FusedLion or DeepSpeedCPULion. Load
    it into FusedAdamW (FusedAdam if it was made with adam_w_mode=False), FusedLAMB or FusedLion.

    The checkpoint must be the state_dict of the optimizer itself, with a state for each param. ZeRO, fp16 and bf16
    engines save flat buffers of many params instead, usually one part per process. docs/migration.md says how to gather
    them.

    DeepSpeed's FusedAdam advances only the step of the last param of each group, once for every dtype among its params.
    Every param of the group gets that count divided by the number of dtypes.

    Args:
        state_dict: state_dict of DeepSpeed's optimizer.

    Raises:
        ValueError: the checkpoint is of another optimizer or of an engine, or of an Adam with bias_correction=False.

    Warns:
        UserWarning: the checkpoint is of a FusedLamb with bias_correction=True. DeepSpeed corrects the bias of the
            update after the ratio of norms. FusedLAMB corrects the averages before it. Updates differ until the
            correction is 1.

    Source: DeepSpeed 0.19.8, deepspeed/ops/adam, lamb and lion.
    """

    def convert(group: Options, states: list[State]) -> tuple[Options, list[State]]:
        if "eps" not in group:  # Lion; DeepSpeedCPULion has an exp_avg_sq that it does not use
            return _without(group, "step", "amsgrad"), [_without(state, "step", "exp_avg_sq") for state in states]
        if "step" in group and any("step" in state for state in states):  # FusedAdam; older ones have the group's only
            dtypes = {state["exp_avg"].dtype for state in states}
            last = max(float(state["step"]) for state in states)
            states = [{**state, "step": last // len(dtypes)} for state in states]
        states = [{**state, "step": _step(state, group)} for state in states]
        group = _without(group, "step")
        if "max_coeff" not in group:
            return _with_bias_correction(group), states
        if group["bias_correction"]:
            warnings.warn(
                "DeepSpeed's FusedLamb corrects the bias of its updates after the ratio of norms and FusedLAMB before "
                "it, so their updates differ until 1 - beta2 ** step is close to 1",
                stacklevel=4,
            )
        clip = group["min_coeff"], group["max_coeff"]
        lamb = {"trust_clip": clip, "max_grad_norm": group["max_grad_norm"] or None}
        lamb |= {"adam_w_mode": True, "grad_averaging": True, "use_nvlamb": True}
        return _without(group, "min_coeff", "max_coeff") | lamb, states

    return _converted(state_dict, "DeepSpeed", convert)


def optimi(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Converts a checkpoint of optimi's (torch-optimi's) AdamW, Adam, SGD or Lion. Load it into FusedAdamW, FusedAdam,
    FusedSGD (FusedSGDW if it was made with decouple_wd=True or decouple_lr=True) or FusedLion.

    optimi's Adam stores bias-corrected averages. They are multiplied by the correction and rounded once. decouple_lr
    becomes lr_reference, for decay="paper". A checkpoint of RAdam looks like one of Adam and is not detected.

    Args:
        state_dict: state_dict of optimi's optimizer.

    Raises:
        ValueError: the checkpoint is of another optimizer.

    Warns:
        UserWarning: the checkpoint has Kahan compensations, which are the low-order parts of 16-bit params. They are
            left out.

    Source: torch-optimi 0.3.3.
    """
    lost = sum(_any(state.get("kahan_comp")) for state in state_dict.get("state", {}).values())
    if lost:
        warnings.warn(
            f"the Kahan compensations of {lost} params are left out, so the low-order parts of these params are lost; "
            "to keep them, make the params float32 and add the compensations: param.float() + kahan_comp.float()",
            stacklevel=2,
        )

    def convert(group: Options, states: list[State]) -> tuple[Options, list[State]]:
        states = [_without(state, "kahan_comp", "group") for state in states]
        states = [{key: value for key, value in state.items() if value is not None} for state in states]
        scales_lr = group["decouple_lr"]
        decoupled = scales_lr or group.get("decouple_wd", True)  # Lion has no such option and is decoupled
        options = _without(group, "beta1", "beta2", "decouple_wd", "decouple_lr", "max_lr", "kahan_sum", "torch_init")
        options = _without(options, "foreach", "triton", "gradient_release", "setup", "step")
        options["decoupled_weight_decay"] = decoupled
        if scales_lr:
            options["lr_reference"] = group["max_lr"]
        if "momentum" in group:
            options |= {"dampening": group["momentum"] if group["dampening"] else 0, "nesterov": False}
            buffers = [{"momentum_buffer": state["exp_avg"]} if group["momentum"] else {} for state in states]
            return options, buffers
        options["betas"] = group["beta1"], group["beta2"]
        if "eps" in group:
            states = [_uncorrected(state, _step(state, group), options["betas"]) for state in states]
        return options, states

    return _converted(state_dict, "optimi", convert)


def bitsandbytes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Converts a checkpoint of bitsandbytes' AdamW, Adam, SGD or Lion in all their forms (8bit, 32bit, Paged). Load it
    into FusedAdamW, FusedSGD or FusedLion. bitsandbytes' Adam decays as AdamW does.

    8-bit states become float32 (see dequantized). Groups do not name their optimizer. SGD and Lion both have one state;
    a group whose second beta is 0 is taken for SGD. bitsandbytes' SGD ignores dampening, so the converted dampening is
    0.

    Args:
        state_dict: state_dict of bitsandbytes' optimizer.

    Raises:
        ValueError: the checkpoint is of another optimizer, or of an old version that quantized whole tensors. Or it has
            states that are not contiguous, whose order in memory depends on the device that wrote them.

    Source: bitsandbytes 0.50.2, bitsandbytes/optim.
    """

    def convert(group: Options, states: list[State]) -> tuple[Options, list[State]]:
        group, betas = _without(group, "alpha", "t_alpha", "t_beta3"), group["betas"]
        if len(betas) != 2:
            raise ValueError("the checkpoint is of bitsandbytes' AdEMAMix, which has no counterpart here")
        states = [_without(state, "__bnb_optimizer_quant_state__") | _wrapped(state) for state in states]
        if any("state2" in state for state in states) or (not states and group["eps"]):
            names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
            group["decoupled_weight_decay"] = True
            steps = [{"step": _step(state, group)} for state in states]
        elif group["eps"]:
            raise ValueError(
                "the checkpoint is of an optimizer of bitsandbytes with one state and eps, RMSprop or Adagrad, which "
                "have no counterpart here"
            )
        else:
            group = _without(group, "eps")
            names = ("exp_avg",) if betas[1] else ("momentum_buffer",)
            if betas[1]:
                group["decoupled_weight_decay"] = True
            else:
                group = _without(group, "betas") | {"momentum": betas[0], "dampening": 0, "nesterov": False}
            steps = [{} for _ in states]
        return group, [_full(state, names) | step for state, step in zip(states, steps, strict=True)]

    return _converted(state_dict, "bitsandbytes", convert)


def dequantized(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    """The values of an 8-bit state: qmap[code] times the absmax of its block.

    Args:
        codes: uint8, any shape, contiguous.
        qmap: float32 [256], the value of each code, in [-1, 1] or [0, 1].
        absmax: float32 [blocks], the scale of each block of 256 elements (2048 in old versions), in memory order.

    Returns:
        float32, with the shape of codes.

    Raises:
        ValueError: the number of blocks fits neither block size.
    """
    for size in (256, 2048):
        if absmax.numel() == -(-codes.numel() // size):
            values = qmap.index_select(0, codes.flatten().int())
            return values.mul_(absmax.repeat_interleave(size)[: codes.numel()]).view(codes.shape)
    raise ValueError(
        f"a state of {codes.numel()} elements must have an absmax for each block of 256 or 2048 of them, but has "
        f"{absmax.numel()}"
    )


def to_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Converts a checkpoint of this package to one that torch's class of the same name loads. States in packed formats
    become float32. What torch's classes do not know is left out: lower halves of master weights, averages of the
    weights, and counts of the whole optimizer. A bfloat16 model that torch shall train on in float32 gets its weights
    from master_params().

    Args:
        state_dict: state_dict of an optimizer of this package.

    Raises:
        ValueError: state_dict is no optimizer's.
        RuntimeError: states in anchored8 lack what they are decoded with.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            'the checkpoint must be a dict with "state" and "param_groups", as state_dict() of an optimizer '
            f"returns it, but has the keys {sorted(map(str, state_dict))}"
        )
    converted = {}
    for index, state in state_dict["state"].items():
        names = [name for name in state if name not in (EMA, LOW, ANCHOR)]
        kept = {name: decoded(state, name) if isinstance(state[name], Tensor) else state[name] for name in names}
        if kept:
            converted[index] = kept
    groups = [_without(group, "state_dtype") for group in state_dict["param_groups"]]
    return {"state": converted, "param_groups": groups}


def to_schedulefree(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Converts a checkpoint of FusedScheduleFreeAdamW or FusedScheduleFreeSGD to one that the package schedulefree
    loads. The other direction needs no converter: load_state_dict() takes checkpoints of the package.

    The package counts updates per group. A group gets the count, weight_sum and lr_max of its param with the most
    updates. States in packed formats become float32. What the package does not know is left out, as in to_torch.

    Args:
        state_dict: state_dict of an optimizer of this package.

    Raises:
        ValueError: state_dict is of no Schedule-Free optimizer.

    Warns:
        UserWarning: the params of a group have had different numbers of updates.

    Source: schedulefree 1.4.1.
    """
    saved = to_torch(state_dict)
    groups = []
    for group in saved["param_groups"]:
        if not {"train_mode", "weight_lr_power"} <= group.keys():
            raise ValueError("the checkpoint must be of FusedScheduleFreeAdamW or FusedScheduleFreeSGD, but is not")
        states = [saved["state"][index] for index in group["params"] if index in saved["state"]]
        if len({float(state["step"]) for state in states}) > 1:
            warnings.warn(
                "the params of a group have had different numbers of updates, and schedulefree counts per group: all "
                "of them get the largest number",
                stacklevel=2,
            )
        most = max(states, key=lambda state: float(state["step"]), default={"step": 0, "weight_sum": 0, "lr_max": -1})
        numbers = {"k": int(most["step"]), "weight_sum": float(most["weight_sum"]), "lr_max": float(most["lr_max"])}
        groups.append({**_without(group, "maximize", "capturable"), **numbers, "scheduled_lr": numbers["lr_max"]})
    scalars = ("step", "weight_sum", "lr_max")
    states_only = {index: _without(state, *scalars) for index, state in saved["state"].items()}
    return {"state": states_only, "param_groups": groups}


# ---- helpers


def _converted(
    state_dict: dict[str, Any],
    library: str,
    convert: Callable[[Options, list[State]], tuple[Options, list[State]]],
) -> dict[str, Any]:
    """Converts every group of the checkpoint together with the states of its params."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f'the checkpoint must be a dict with "state" and "param_groups", as an optimizer of {library} returns it, '
            f"but has the keys {sorted(map(str, state_dict))}; the checkpoint of an engine can hold it under another "
            "key, or hold flat buffers, which must be gathered by param first (see docs/migration.md)"
        )
    saved = state_dict["state"]
    groups, converted = [], {}
    for group in state_dict["param_groups"]:
        begun = [index for index in group["params"] if saved.get(index)]
        try:
            options, states = convert({**group, "params": list(group["params"])}, [dict(saved[i]) for i in begun])
        except KeyError as missing:
            raise ValueError(
                f"the checkpoint is of no optimizer of {library} known here: it has no {missing}"
            ) from None
        groups.append(options)
        for index, state in zip(begun, states, strict=True):
            unknown = [key for key in state if key not in STATES]
            if unknown:
                raise ValueError(
                    f"the checkpoint has states of an optimizer of {library} that has no counterpart here: {unknown}"
                )
            converted[index] = state
    counts = {key: state_dict[key] for key in COUNTS if key in state_dict}
    return {**counts, "state": converted, "param_groups": groups}


def _without(mapping: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _with_bias_correction(group: Options) -> Options:
    if not group.get("bias_correction", True):
        raise ValueError(
            "the checkpoint is of an Adam with bias_correction=False, but the classes here always correct it; finish "
            "this training with the old optimizer, or start without its states"
        )
    return _without(group, "bias_correction")


def _step(state: State, group: Options) -> Tensor:
    """The step count of a param, or of its group, as a new tensor."""
    step = state.get("step", group.get("step"))
    if step is None:
        raise ValueError('the checkpoint must have a "step" in its groups or in the states, but has none')
    return torch.tensor(float(step))


def _uncorrected(state: State, step: Tensor, betas: tuple[float, float]) -> State:
    corrections = {"exp_avg": 1 - betas[0] ** step.item(), "exp_avg_sq": 1 - betas[1] ** step.item()}
    products = {key: state[key] if scale == 1 else state[key] * scale for key, scale in corrections.items()}
    return {**state, **products, "step": step}


def _any(compensation: Tensor | None) -> bool:
    return compensation is not None and bool(compensation.any())


def _wrapped(state: State) -> State:
    """The states that newer versions of bitsandbytes keep in a dict, to hide them from FSDP."""
    return state.get("__bnb_optimizer_quant_state__", {})


def _full(state: State, names: tuple[str, ...]) -> State:
    """The state with state1 and state2 under torch's names and in full precision. Unknown keys stay."""
    full = _without(state, "step", "gnorm_vec")  # gnorm_vec: past norms, for percentile clipping
    for number, name in enumerate(names, start=1):
        stored = full.pop(f"state{number}")
        if not stored.is_contiguous():
            raise ValueError(
                f"a state of shape {tuple(stored.shape)} and strides {stored.stride()} is not contiguous: bitsandbytes "
                "writes such states in memory order on GPUs and in element order on CPUs, and the checkpoint does not "
                "say which; remove the state of this param from the checkpoint, so that it starts again at 0"
            )
        if stored.dtype == torch.uint8 and f"absmax{number}" in full:
            stored = dequantized(stored, full.pop(f"qmap{number}"), full.pop(f"absmax{number}"))
        full[name] = stored
    return full
