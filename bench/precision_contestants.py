"""What bench/precision.py compares: ways to store the params and states of AdamW. Ours are the real kernels. Those of
FlashOptim and bitsandbytes are computed by their formulas, in plain PyTorch: FlashOptim's quantized states need a GPU,
and a step of bitsandbytes takes milliseconds per tensor on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_optim import FusedAdamW
from fused_optim.interop.convert_masters import corrected_by, flashoptim_values

BF16, F32 = torch.bfloat16, torch.float32
FLASH_GROUP, BNB_BLOCK = 32, 256


# ---- formats of other libraries


def in_groups(values: Tensor, size: int) -> Tensor:
    """[groups, size], the last group filled up with zeros."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


class Flash:
    """FlashOptim 0.1.4: int8 for exp_avg, uint8 for the root of exp_avg_sq, a float16 scale for 32 elements."""

    def __init__(self, signed: bool) -> None:
        self.signed = signed

    def encode(self, value: Tensor) -> Any:
        groups = in_groups(value if self.signed else value.sqrt(), FLASH_GROUP)
        largest = groups.abs().amax(1).clamp(min=1e-12)
        share = groups / largest[:, None]
        if self.signed:
            share = 2 * share / (1 + share.abs())
        codes = (share * (127 if self.signed else 255) + 0.5).floor().flatten()[: value.numel()].view(value.shape)
        return codes.to(torch.int8 if self.signed else torch.uint8), largest.half()

    def decode(self, stored: Any) -> Tensor:
        return flashoptim_values(*stored)


class Dynamic:
    """bitsandbytes 0.50.2: the nearest of 256 values of a dynamic map, times the largest magnitude of 256 elements."""

    def __init__(self, signed: bool) -> None:
        self.map = dynamic_map(signed)
        self.between = (self.map[1:] + self.map[:-1]) / 2

    def encode(self, value: Tensor) -> Any:
        groups = in_groups(value, BNB_BLOCK)
        largest = groups.abs().amax(1)
        share = groups / largest.clamp(min=torch.finfo(F32).tiny)[:, None]
        return torch.bucketize(share, self.between).to(torch.uint8), largest, value.shape

    def decode(self, stored: Any) -> Tensor:
        codes, largest, shape = stored
        return (self.map[codes.int()] * largest[:, None]).flatten()[: shape.numel()].view(shape)


def dynamic_map(signed: bool) -> Tensor:
    """Dettmers et al., "8-bit Optimizers via Block-wise Quantization": for each exponent of ten from -6 to 0 the means
    of equal parts of [0.1, 1], twice as many with each exponent. One bit is the sign if there are signs."""
    values, exponents = [], 7
    for exponent in range(exponents):
        parts = 2 ** (exponent + (0 if signed else 1))
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - exponents + 1)
        values += [*means.tolist(), *((-means).tolist() if signed else [])]
    return torch.tensor([0.0, 1.0, *values], dtype=torch.float64).sort().values.float()


class Emulated(Optimizer):
    """AdamW in float32 whose states are stored in a format of another library. With `correct` params are bfloat16 and
    have FlashOptim's 8-bit corrections."""

    def __init__(self, params: Any, formats: tuple[Any, Any], correct: bool = False, **options: Any) -> None:
        self.formats, self.correct = formats, correct
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    zeros = torch.zeros(param.shape)
                    state.update(step=0, mean=self.formats[0].encode(zeros), square=self.formats[1].encode(zeros))
                    state["bits"] = torch.zeros(param.shape, dtype=torch.int8)
                state["step"] += 1
                grad = param.grad.float()
                mean = self.formats[0].decode(state["mean"]).mul_(beta1).add_(grad, alpha=1 - beta1)
                square = self.formats[1].decode(state["square"]).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                debias1, debias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
                master = corrected_by(param, state["bits"], 3) if self.correct else param
                master = master * (1 - group["lr"] * group["weight_decay"])
                master = master - group["lr"] / debias1 * mean / ((square / debias2).sqrt() + group["eps"])
                param.copy_(master)
                if self.correct:
                    exponent = (param.view(torch.int16).int() >> 7 & 255).clamp(min=1) - 127
                    unit = (exponent - 8 + 1023).long() << 52
                    error = (master.double() - param.double()) / unit.view(torch.float64)
                    state["bits"] = (error.clamp(-1, 1) * 127).round().to(torch.int8)
                state["mean"], state["square"] = self.formats[0].encode(mean), self.formats[1].encode(square)

    def exp_avg_sq(self, param: Tensor) -> Tensor:
        return self.formats[1].decode(self.state[param]["square"])


# ---- contestants


@dataclass(frozen=True)
class Contestant:
    """dtype: of params and gradients. stored: bytes of a param and its states. options: of FusedAdamW. kind: makes an
    optimizer of another library's formats in place of ours."""

    name: str
    dtype: torch.dtype
    stored: float
    options: dict[str, Any] = field(default_factory=dict)
    kind: Callable[..., Optimizer] | None = None

    def optimizer(self, params: Sequence[Tensor], **options: Any) -> Any:
        if self.kind is not None:
            return self.kind(params, **options)
        return FusedAdamW(params, **options, **self.options)

    def master(self, optimizer: Any, param: Tensor) -> Tensor:
        """The param with all bits that are kept of it."""
        if isinstance(optimizer, Emulated):
            return (
                corrected_by(param.detach(), optimizer.state[param]["bits"], 3) if optimizer.correct else param.detach()
            )
        return optimizer.master_params()[0]

    def exp_avg_sq(self, optimizer: Any, param: Tensor) -> Tensor:
        """float32."""
        if isinstance(optimizer, Emulated):
            return optimizer.exp_avg_sq(param)
        stored = optimizer.state[param]["exp_avg_sq"]
        return (stored.int() << 15).view(F32) if stored.dtype == torch.uint16 else stored.float()


def flash(params: Any, **options: Any) -> Optimizer:
    return Emulated(params, (Flash(True), Flash(False)), correct=True, **options)


def bnb(params: Any, **options: Any) -> Optimizer:
    return Emulated(params, (Dynamic(True), Dynamic(False)), **options)


PAIR = {"exp_avg": BF16, "exp_avg_sq": "e8m8"}
BASE = "float32"
CONTESTANTS = [
    Contestant(BASE, F32, 12),
    Contestant("bfloat16, rounded to nearest", BF16, 6),
    Contestant("bfloat16, float32 states", BF16, 10, {"state_dtype": F32}),
    Contestant("exact masters, float32 states", BF16, 12, {"master_weights": "exact"}),
    Contestant(
        "exact masters, bfloat16 + e8m8",
        BF16,
        8,
        {"master_weights": "exact", "state_dtype": PAIR, "rounding": "dithered"},
    ),
    Contestant("exact masters, compact", BF16, 7, {"master_weights": "exact", "state_dtype": "compact"}),
    Contestant("24-bit masters, compact", BF16, 6, {"master_weights": "24bit", "state_dtype": "compact"}),
    Contestant("bfloat16 dithered, compact", BF16, 5, {"rounding": "dithered", "state_dtype": "compact"}),
    Contestant("FlashOptim, 24-bit masters", BF16, 3 + 2 + 4 / FLASH_GROUP, kind=flash),
    Contestant("bitsandbytes 8-bit, float32", F32, 4 + 2 + 8 / BNB_BLOCK, kind=bnb),
]
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
