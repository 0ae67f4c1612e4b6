"""A few steps over tensors of odd sizes and alignments on both GPU backends. Small enough for compute-sanitizer."""

from __future__ import annotations

from typing import Any

import torch

from fused_optim import FusedAdamW, FusedLAMB, FusedLion, FusedQHAdamW, FusedSGD

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {}),
    (FusedAdamW, {"amsgrad": True}),
    (FusedSGD, {"momentum": 0.9}),
    (FusedQHAdamW, {"nus": (0.7, 1.0)}),
    (FusedLAMB, {}),
    (FusedLion, {}),
]
SIZES = [0, 1, 31, 1000, 4096, 4097, 9000]


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Each size twice: aligned, and as a view that starts at the third element of a longer buffer."""
    views = [torch.randn(size + 4, device="cuda", dtype=dtype)[2 : 2 + size] for size in SIZES]
    return [torch.randn(size, device="cuda", dtype=dtype) for size in SIZES] + views


def main() -> None:
    for backend in ("triton", "cuda"):
        for build, options in OPTIMIZERS:
            params = [tensor.requires_grad_() for dtype in (torch.float32, torch.bfloat16) for tensor in tensors(dtype)]
            optimizer = build(params, backend=backend, **options)
            for step in range(3):
                for index, param in enumerate(params):
                    param.grad = None if (index + step) % 5 == 0 else torch.randn_like(param)
                optimizer.step()
            torch.cuda.synchronize()
            finite = all(bool(param.isfinite().all()) for param in params)
            print(f"{backend}, {build.__name__} {options}: {'finite' if finite else 'NOT finite'}")
            if not finite:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
