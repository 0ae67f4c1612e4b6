"""Measures the host overhead of DTensor params: a step over T shards of 8 elements, against the same plain tensors.

    python bench/dtensor.py                 # into bench/results/<machine>/dtensor.json and dtensor.md
    python bench/dtensor.py --device cuda

AdamW runs alone and with clipping by the global gradient norm (ours clips inside the step). The mesh has one process,
so no collective is timed, and the columns differ by the wrapping only. On a CPU the time is that of the whole step,
which is mostly overhead at 8 elements per tensor. On a GPU it is the time until step() returns, on an idle device.
Before the timing every peer's params are compared with those of torch's for-loop over plain tensors. Peers take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from environment import ROOT, describe, device_name, folder_name
from measure import host_times, progress
from report import markdown, number
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_

sys.path.append(str(ROOT))
from fused_optim import FusedAdamW

TENSORS = (10, 148, 1000)
SHAPE = (4, 2)
MAX_NORM = 0.5
UPDATES = ("step", "clip+step")
PEERS = ("torch foreach", "torch fused", "ours")
Step = Callable[[], Any]


def torch_step(params: list[Tensor], clip: bool, **options: Any) -> Step:
    optimizer = torch.optim.AdamW(params, **options)

    def clip_and_step() -> None:
        clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return clip_and_step if clip else optimizer.step


def ours(params: list[Tensor], clip: bool) -> Step:
    return FusedAdamW(params, max_grad_norm=MAX_NORM if clip else None).step


BUILD: dict[str, Callable[[list[Tensor], bool], Step]] = {
    "torch foreach": partial(torch_step, foreach=True),
    "torch fused": partial(torch_step, fused=True),
    "ours": ours,
}


def make(count: int, mesh: DeviceMesh, wrapped: bool) -> list[Tensor]:
    """Params with gradients. Every call makes the same values."""
    torch.manual_seed(0)
    params: list[Tensor] = []
    for _ in range(count):
        param, grad = torch.randn(SHAPE, device=mesh.device_type), torch.randn(SHAPE, device=mesh.device_type)
        if wrapped:
            param, grad = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (param, grad))
        params.append(param.requires_grad_())
        param.grad = grad
    return params


def check(count: int, clip: bool, mesh: DeviceMesh, build: Callable[[list[Tensor], bool], Step], wrapped: bool) -> None:
    """Compares the params after two steps with those of torch's for-loop over plain tensors.

    Raises:
        AssertionError: they differ.
    """
    got, want = make(count, mesh, wrapped), make(count, mesh, False)
    for step in (build(got, clip), torch_step(want, clip, foreach=False)):
        step()
        step()
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p.full_tensor() if isinstance(p, DTensor) else p, q, rtol=1e-4, atol=1e-6)


def measure(count: int, clip: bool, mesh: DeviceMesh, rounds: int) -> dict[str, dict[str, float]]:
    """Median µs of a step by peer, over plain tensors and over DTensors."""
    steps: dict[tuple[str, str], Step] = {}
    for name in PEERS:
        for kind in ("plain", "dtensor"):
            progress(f"{count:,} tensors: checking {name}, {kind}")
            check(min(count, 20), clip, mesh, BUILD[name], kind == "dtensor")
            steps[name, kind] = BUILD[name](make(count, mesh, kind == "dtensor"), clip)
            for _ in range(3):
                steps[name, kind]()
    medians = host_times(steps, f"{count:,} tensors", rounds)
    return {name: {kind: medians[name, kind] for kind in ("plain", "dtensor")} for name in PEERS}


def table(results: list[dict[str, Any]]) -> str:
    header = ["tensors", "update", "peer", "plain, µs", "DTensor, µs", "DTensor : plain"]
    rows = [
        [
            f"{result['tensors']:,}",
            result["update"],
            name,
            number(us["plain"]),
            number(us["dtensor"]),
            number(us["dtensor"] / us["plain"]),
        ]
        for result in results
        for name, us in result["median_us"].items()
    ]
    return markdown(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tensors", type=int, nargs="+", default=TENSORS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder of dtensor.json, .md (default: bench/results/<machine>)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("Nothing was measured: torch finds no GPU on this machine.", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        store = dist.FileStore(f"{scratch}/store", 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
        mesh = init_device_mesh(device.type, (1,))
        results = [
            {"tensors": count, "update": update, "median_us": measure(count, update != "step", mesh, options.rounds)}
            for count in options.tensors
            for update in UPDATES
        ]
        dist.destroy_process_group()
    print(table(results))
    folder = options.out or ROOT / "bench" / "results" / folder_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    about = describe(device)
    content = {"about": about, "shape": SHAPE, "rounds": options.rounds, "results": results}
    (folder / "dtensor.json").write_text(json.dumps(content, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = f"# DTensor params on {device_name(device)}: AdamW, host time per step\n\n{facts}\n\n"
    text += f"Medians over {options.rounds} rounds. Peers take turns. The mesh has one process.\n\n{table(results)}\n"
    (folder / "dtensor.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
