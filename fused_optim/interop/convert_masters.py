"""Converts checkpoints of libraries that keep master weights of bfloat16 params: FlashOptim, NVIDIA Transformer Engine
and Megatron-LM. See convert.py."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import formats
from ..engine.dtensor import like, local
from ..engine.masters import LOW
from .convert import Options, State, _converted, _step, _with_bias_correction, _without

GROUP = 32  # elements of FlashOptim that share a scale
QUANTIZED, SCALES = "::quantized", "::scales"
SCALED = "exp_avg", "exp_avg_sq", "momentum_buffer"


def flashoptim(state_dict: dict[str, Any], params: Sequence[Tensor] | None = None) -> dict[str, Any]:
    """Converts a checkpoint of FlashOptim's FlashAdamW, FlashAdam, FlashSGD, FlashSGDW or FlashLion, compressed or not.
    Load it into the class here with the same name, Fused in place of Flash.

    Quantized states become float32. The corrections of 24-bit and 32-bit master weights become the lower halves of
    those here (`"param_low"`, int16); 24-bit ones are rounded to the nearest float32.

    Args:
        state_dict: state_dict of FlashOptim's optimizer.
        params: the model's params with the values that belong to the checkpoint, in the order of the optimizer's
            groups. They are needed for master weights, which are stored relative to them. The few params that lie
            exactly between two bfloat16 numbers are written to; float32 params get the whole master weights.

    Raises:
        ValueError: the checkpoint is of another optimizer, or params do not fit it.

    Warns:
        UserWarning: the checkpoint has master weights and params is missing. They are left out.

    Source: FlashOptim 0.1.4.
    """
    masters = _Masters(params, "error_bits", state_dict)

    def convert(group: Options, states: list[State]) -> tuple[Options, list[State]]:
        width = group["master_bytewidth"]
        options = _without(group, "master_bytewidth", "quantize")
        found = []
        for index, state in zip(masters.begun(group), states, strict=True):
            full = {key: value for key, value in state.items() if "::" not in key and key != "error_bits"}
            for name in SCALED:
                if name + QUANTIZED in state:
                    codes, scales = state[name + QUANTIZED], state[name + SCALES]
                    full[name] = like(codes, flashoptim_values(local(codes), local(scales)))
            if "step" in full:
                full["step"] = _step(state, group)
            bits = state.get("error_bits")
            if bits is not None and width and masters.given(index):
                corrected = corrected_by(local(masters.params[index]), local(bits), width)
                full |= masters.adopt(index, corrected)
            found.append(full)
        return options, found

    converted = _converted(state_dict, "FlashOptim", convert)
    masters.warn()
    return converted


def flashoptim_values(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of a quantized state of FlashOptim.

    Args:
        codes: int8 (exp_avg, momentum_buffer) or uint8 (the square root of exp_avg_sq), any shape.
        scales: float16 [groups], or the same bits as bfloat16: the largest magnitude among each 32 elements.

    Returns:
        float32, with the shape of codes.

    Raises:
        ValueError: codes or scales have another dtype, or their numbers do not fit.
    """
    if codes.dtype not in (torch.int8, torch.uint8) or scales.numel() != -(-codes.numel() // GROUP):
        raise ValueError(
            f"a quantized state of FlashOptim must be int8 or uint8 and have a scale for each {GROUP} elements, but is "
            f"{codes.dtype} with {codes.numel()} elements and {scales.numel()} scales"
        )
    if scales.dtype == torch.bfloat16:
        scales = scales.view(torch.float16)
    largest = scales.float().repeat_interleave(GROUP)[: codes.numel()].view(codes.shape)
    if codes.dtype == torch.uint8:
        return (codes.float() / 255 * largest).square()
    share = codes.float() / 127
    return share / (2 - share.abs()) * largest


def corrected_by(param: Tensor, bits: Tensor, width: int) -> Tensor:
    """FlashOptim's master weights, float32. bits: the corrections, in units of half a unit in the last place of the
    param over the largest integer. width: bytes of the param and its correction together."""
    if bits.dtype == torch.bfloat16:  # as it is in checkpoints: int16 as the same bits, int8 as the same number
        bits = bits.view(torch.int16) if width == 4 else bits.to(torch.int8)
    largest = 32767 if bits.dtype == torch.int16 else 127
    exponent = (formats.bits_of(param) >> 23 & 255).clamp(min=1) - 127
    unit = (exponent - 7 - 1 + 1023 << 52).view(torch.float64)  # 2 ** (exponent - 8)
    return (param.double() + bits.double() / largest * unit).float()


def transformer_engine(state_dict: dict[str, Any], params: Sequence[Tensor] | None = None) -> dict[str, Any]:
    """Converts a checkpoint of Transformer Engine's FusedAdam, and of Megatron-LM's precision-aware optimizer, where
    each param has its states (dist_ckpt_optim_fully_reshardable). Load it into FusedAdamW, or FusedAdam if it was made
    with adam_w_mode=False.

    state_dict() of Transformer Engine returns states without their scales, in float32, whatever they are stored in.
    Master weights are `"master_param"`, or `"param"` in Megatron. As int16 (store_param_remainders=True) they are the
    lower halves here, bit for bit.

    Args:
        state_dict: state_dict of the optimizer. In Megatron the dict with "param_groups", and with "state": a dict of
            "param", "exp_avg" and "exp_avg_sq" for each param, in the shape of the param.
        params: the model's params, in the order of the optimizer's groups. They are needed for master weights in
            float32, which are written into them: whole into float32 params, the upper halves into bfloat16 ones.

    Raises:
        ValueError: the checkpoint is of another optimizer, or of one with bias_correction=False, or states still have
            scales, or params do not fit it.

    Warns:
        UserWarning: the checkpoint has master weights in float32 and params is missing. They are left out.

    Source: transformer_engine/pytorch/optimizers/fused_adam.py and multi_tensor/adam.cu of Transformer Engine;
    megatron/core/optimizer/distrib_optimizer.py.
    """
    masters = _Masters(params, "master_param", state_dict)

    def convert(group: Options, states: list[State]) -> tuple[Options, list[State]]:
        options = _without(_with_bias_correction(group), "step")
        found = []
        for index, state in zip(masters.begun(group), states, strict=True):
            full = _without(state, "master_param", "param")
            for name in ("exp_avg", "exp_avg_sq"):
                if full[name].dtype not in (torch.float32, torch.bfloat16):
                    raise ValueError(
                        f"state {name!r} must be torch.float32 or torch.bfloat16, but is {full[name].dtype} and has "
                        "lost its scale; save what state_dict() of the optimizer returns, which has no scales"
                    )
            full["step"] = _step(state, group)
            master = state.get("master_param", state.get("param"))
            if master is not None and master.dtype == torch.int16:
                full[LOW] = master
            elif master is not None and masters.given(index):
                full |= masters.adopt(index, local(master))
            found.append(full)
        return options, found

    converted = _converted(state_dict, "Transformer Engine", convert)
    masters.warn()
    return converted


class _Masters:
    """The master weights of a checkpoint, on their way into params and lower halves. key: what they are called."""

    def __init__(self, params: Sequence[Tensor] | None, key: str, state_dict: dict[str, Any]) -> None:
        self.params = [] if params is None else list(params)
        self.key, self.saved = key, state_dict.get("state", {})
        self.lost = 0
        count = sum(len(group["params"]) for group in state_dict.get("param_groups", ()))
        if params is not None and len(self.params) != count:
            raise ValueError(
                f"params must be those of the optimizer, {count} in the checkpoint, but are {len(self.params)}; pass "
                "them in the order of its groups"
            )

    def begun(self, group: Options) -> list[int]:
        return [index for index in group["params"] if self.saved.get(index)]

    def given(self, index: int) -> bool:
        """Whether the param is at hand."""
        self.lost += not self.params
        return bool(self.params)

    @torch.no_grad()
    def adopt(self, index: int, master: Tensor) -> State:
        """Writes the master weights of a param into it. Returns the entry for its state."""
        param = self.params[index]
        shard = local(param)
        if shard.shape != master.shape or shard.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"param {index} must have the shape of its master weights, {tuple(master.shape)}, and be torch.float32 "
                f"or torch.bfloat16, but has shape {tuple(shard.shape)} and is {shard.dtype}; pass the model's params "
                "in the order of the optimizer's groups"
            )
        if shard.dtype == torch.float32:
            param.copy_(like(param, master.to(shard.device, torch.float32)))
            return {}
        upper, lower = formats.split(master.to(shard.device))
        if not torch.equal(shard, upper):
            param.copy_(like(param, upper))
        return {LOW: like(param, lower)}

    def warn(self) -> None:
        if self.lost:
            warnings.warn(
                f"the master weights of {self.lost} params ({self.key!r}) are left out, because they belong to values "
                "of the params; pass the model's params, too",
                stacklevel=3,
            )
