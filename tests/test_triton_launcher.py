"""The launcher of the Triton kernels: how many kernels it compiles, and what it hands to them."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fused_optim.triton_kernels import launch as launching
from fused_optim.triton_kernels.launch import (
    ROW_SUMS,
    RULES,
    TOTAL,
    Variant,
    apply_update_variant,
    prep_variant,
    scale_variant,
    squares_variant,
    step_variant,
    trust_variant,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from fused_optim.engine.layout import Format, TableArrays

pytestmark = pytest.mark.codegen
__test__ = os.environ.get("TRITON_INTERPRET") != "1"  # With TRITON_INTERPRET=1 Triton compiles nothing.

HOPPER = GPUTarget("cuda", 90, 32)
F32, BF16 = int(Format.FLOAT32), int(Format.BFLOAT16)
F32_KINDS = ((F32,) * 4,)


class Stand:
    """Replaces a kernel and the handle that its first launch returns. Records the grids and arguments of launches."""

    def __init__(self) -> None:
        self.first: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self.later: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.first.append((grid, args))
            return Handle(self)

        return run


@dataclass
class Handle:
    stand: Stand

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.stand.later.append((grid, args))


LAUNCHED = {
    "adam": {"prep": prep_variant(None, False, False, 0), "step": step_variant("adam", F32_KINDS, False, False)},
    "lamb": {
        "squares": squares_variant(F32_KINDS),
        "total": TOTAL,
        "prep": prep_variant(RULES["lamb"].scalars, True, True, 0),
        "step": step_variant("lamb", F32_KINDS, False, False),
        "row sums": ROW_SUMS,
        "trust": trust_variant(RULES["lamb"].ratio),
        "apply update": apply_update_variant("lamb", F32_KINDS, False, False),
        "scale": scale_variant(F32_KINDS),
    },
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Variant, Any]]:
    """The kernels of all launched variants. In the variants each kernel is replaced by a Stand."""
    variants = [variant for variants in LAUNCHED.values() for variant in variants.values()]
    real = {variant: variant.kernel for variant in variants}
    for variant in variants:
        monkeypatch.setattr(variant, "kernel", Stand())
        monkeypatch.setattr(variant, "handles", {})
    monkeypatch.setattr(launching, "_target", lambda: HOPPER)
    yield real


def take_step(rule: str, tensors: int = 40, offset: int = 0, values: float = 0.0, chunks: int | None = None) -> None:
    """A step with `tensors` tensors. The tables start `offset` elements after an aligned address."""

    def array(dtype: torch.dtype, size: int = tensors) -> torch.Tensor:
        return torch.full((size + offset,), values, dtype=torch.float64).to(dtype)[offset:]

    i64, f64 = torch.int64, torch.float64
    arrays = TableArrays(
        chunk_table=array(i64, tensors if chunks is None else chunks),
        rows=array(i64),
        grads=array(i64),
        lr=array(i64),
        group_hparams=array(f64),
        group_index=array(torch.int32),
        tensor_scalars=array(f64),
    )
    squares = None
    if rule == "lamb":
        arrays = arrays._replace(row_offsets=array(i64), partials=array(f64), sums=array(f64), trust=array(f64))
        squares = array(f64, 1)
        launching.launch_squares(F32_KINDS, arrays, squares)
        launching.launch_scale(F32_KINDS, arrays, squares)
    launching.launch(rule, F32_KINDS, arrays, None, array(torch.float32, 1), squares)
    launching.launch_apply_update(rule, F32_KINDS, arrays)


@pytest.mark.parametrize("rule", LAUNCHED)
def test_later_launches_go_through_the_handle(kernels: dict[Variant, Any], rule: str) -> None:
    for _ in range(3):
        take_step(rule)
    take_step(rule, chunks=0)
    for name, variant in LAUNCHED[rule].items():
        over_chunks = name in ("squares", "scale", "step", "apply update")
        stand = variant.kernel
        assert (len(stand.first), len(stand.later)) == (1, 2 if over_chunks else 3), name
        grid, args = stand.first[0]
        assert grid == ({"prep": 2, "trust": 2, "total": 1}.get(name, 40), 1, 1)
        for other, others in stand.later:
            assert other == grid and [type(arg) for arg in others] == [type(arg) for arg in args]
    others = LAUNCHED["lamb" if rule == "adam" else "adam"].values()
    assert not any(variant.kernel.first for variant in others)


@pytest.mark.parametrize("rule", LAUNCHED)
def test_one_specialisation_whatever_the_values(kernels: dict[Variant, Any], rule: str) -> None:
    """1cycle changes lr and betas at every step, and models grow and shrink. None of this may cause a recompilation,
    and the kernel must be the one that these tests compile."""
    for tensors, offset, values in itertools.product((1, 16, 17, 1000), (0, 1), (0.0, 1.0, 16.0)):
        take_step(rule, tensors, offset, values)
    for name, variant in LAUNCHED[rule].items():
        kernel = kernels[variant]
        binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(HOPPER))
        keys = set()
        for _, args in variant.kernel.first + variant.kernel.later:
            _, specialization, options = binder(*args, **variant.options(HOPPER))
            keys.add(compute_cache_key({}, specialization, options))
            types = [entry[0] for entry in specialization]
        assert len(keys) == 1, name
        constants = {*variant.constants, *variant.absent}
        expected = ["constexpr" if key in constants else launching.TYPES[key] for key in kernel.arg_names]
        assert types == expected, name


def test_kinds_have_kernels_of_their_own() -> None:
    assert step_variant("adam", ((BF16,) * 4,), False, False) is not step_variant("adam", F32_KINDS, False, False)
    assert step_variant("qhadam", F32_KINDS, False, False) is not step_variant("adam", F32_KINDS, False, False)
    assert step_variant("adam", F32_KINDS, False, False) is step_variant("adam", F32_KINDS, False, False)
    # The first walk of a rule with a trust ratio does not access averages.
    assert step_variant("lamb", ((F32,) * 5,), True, False) is step_variant("lamb", F32_KINDS, False, False)
