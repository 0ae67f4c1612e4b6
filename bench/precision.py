"""What the formats of params and states are worth: small updates, averages, gradients of different scales, training and
memory, for our kernels and beside the formats of FlashOptim and bitsandbytes. Writes precision.json, precision.md and
plots to bench/results/precision/.

    python bench/precision.py              about six minutes on two cores
    python bench/precision.py --quick --out DIR    a smoke run
    python bench/precision.py --report     writes the page again from precision.json
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import environment
import precision_report
import torch
from precision_contestants import BASE, BF16, BY_NAME, CONTESTANTS, F32, Contestant
from precision_tasks import TASKS, final_loss
from torch import nn

from fused_optim import release_gradients

BETAS = (0.9, 0.999)


def small_updates(contestant: Contestant, steps: int) -> dict[str, float]:
    """Every step takes 1e-5 off each weight of [0.5, 1). Mean and largest error of what was taken off, as shares."""
    begin = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) / 2 + 0.5).to(contestant.dtype)
    param = nn.Parameter(begin.clone())
    # Adam's update is lr where all gradients are equal.
    optimizer = contestant.optimizer([param], lr=1e-5, betas=BETAS, weight_decay=0.0, eps=0.0)
    param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    taken = (begin.double() - contestant.master(optimizer, param).double()) / (1e-5 * steps) - 1
    return {"mean": float(taken.mean()), "largest": float(taken.abs().max())}


def averages(contestant: Contestant, steps: int) -> dict[str, float]:
    """exp_avg_sq over its exact value: after Gaussian gradients, after as many that are half as large, and after as
    many that are 0."""
    param = nn.Parameter(torch.zeros(1024, dtype=contestant.dtype))
    optimizer = contestant.optimizer([param], lr=0.0, betas=BETAS, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    exact, found = torch.zeros(1024, dtype=torch.float64), {}
    for phase, size in (("gaussian", 1.0), ("half", 0.5), ("zero", 0.0)):
        for _ in range(steps):
            param.grad = (torch.randn(1024, generator=draw) * size).to(contestant.dtype)
            exact.mul_(BETAS[1]).add_((1 - BETAS[1]) * param.grad.double().square())
            optimizer.step()
        found[phase] = float((contestant.exp_avg_sq(optimizer, param).double() / exact).mean())
    return found


def different_scales(contestant: Contestant, sigma: float, steps: int) -> dict[str, float]:
    """Gradients of fixed scales exp(sigma * z) for each element. The update of the last steps beside the exact one:
    their cosine, and the largest element over lr (exact: about 1)."""
    draw = torch.Generator().manual_seed(0)
    scales = 0.1 * torch.exp(sigma * torch.randn(4096, generator=draw))  # FlashOptim's are float16
    param = nn.Parameter(torch.zeros(4096))  # float32: what counts is the states
    optimizer = contestant.optimizer([param], lr=1.0, betas=BETAS, weight_decay=0.0)
    mean, square = (torch.zeros(4096, dtype=torch.float64) for _ in range(2))
    cosines, largest = [], 0.0
    for step in range(1, steps + 1):
        param.data.zero_()
        param.grad = torch.randn(4096, generator=draw) * scales
        optimizer.step()
        mean.mul_(BETAS[0]).add_((1 - BETAS[0]) * param.grad.double())
        square.mul_(BETAS[1]).add_((1 - BETAS[1]) * param.grad.double().square())
        if step > steps // 2:
            exact = -mean / (1 - BETAS[0] ** step) / ((square / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
            cosines.append(float(torch.cosine_similarity(exact, param.detach().double(), dim=0)))
            largest = max(largest, float(param.detach().abs().max()))
    return {"cosine": sum(cosines) / len(cosines), "largest": largest}


def of_states(contestant: Contestant) -> Contestant:
    """The same with float32 params and no master weights, so that updates show what states do."""
    options = {key: value for key, value in contestant.options.items() if key != "master_weights"}
    if contestant.dtype == BF16 and contestant.kind is None:
        options.setdefault("state_dtype", F32 if "master_weights" in contestant.options else BF16)
    kind = contestant.kind
    if kind is None:
        return Contestant(contestant.name, F32, contestant.stored, options)

    def uncorrected(params: Any, **more: Any) -> Any:
        made: Any = kind(params, **more)
        made.correct = False
        return made

    return Contestant(contestant.name, F32, contestant.stored, kind=uncorrected)


# ---- memory, in child processes


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def layers(count: int, width: int, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(count)))


def measured_memory(name: str, release: bool, count: int, width: int) -> float:
    """Bytes per param: params, states and the gradients that exist at once, above what the process has without them.
    The highest value of the second step, sampled where a gradient arrives and after the step."""
    torch.set_num_threads(1)
    contestant = BY_NAME[name]
    x = torch.zeros(1, width, dtype=contestant.dtype)
    # Everything that the first step loads or allocates once.
    small = layers(1, width, contestant.dtype)
    warm = contestant.optimizer(list(small.parameters()), lr=1e-3)
    for _ in range(2):
        small(x).sum().backward()
        warm.step()
    del small, warm
    gc.collect()
    before, highest = resident(), 0

    def sample(_: Any = None) -> None:
        nonlocal highest
        highest = max(highest, resident())

    model = layers(count, width, contestant.dtype)
    optimizer = contestant.optimizer(list(model.parameters()), lr=1e-3)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(sample)
    if release:
        release_gradients(model, optimizer, bucket_bytes=1)
    for step in range(2):
        highest = highest if step else 0
        model(x).sum().backward()
        optimizer.step()
        sample()
        optimizer.zero_grad()
    return (highest - before) / (count * width * width)


# ---- all of it


def alone(function: Any, *arguments: Any) -> Any:
    """The result of a function in a new process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # there, what is freed goes back to the system at once
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=start_worker) as executor:
        return executor.submit(function, *arguments).result()


def start_worker() -> None:
    warnings.filterwarnings("ignore", "exp_avg_sq is stored in bfloat16")
    torch.set_num_threads(1)


def measure(quick: bool, jobs: int) -> dict[str, Any]:
    start_worker()
    share = 20 if quick else 1
    result: dict[str, Any] = {"about": environment.describe(torch.device("cpu")), "base": BASE}
    result["contestants"] = {contestant.name: contestant.stored for contestant in CONTESTANTS}
    for name, rows in sections(share):
        print(f"{name} ...", file=sys.stderr, flush=True)
        result[name] = dict(rows)
    print("memory ...", file=sys.stderr, flush=True)
    size = (4, 256) if quick else (24, 1024)
    ours = [contestant.name for contestant in CONTESTANTS if contestant.kind is None]
    result["memory"] = {
        name: {way: alone(measured_memory, name, way == "release", *size) for way in ("plain", "release")}
        for name in ours
    }
    print("training ...", file=sys.stderr, flush=True)
    steps, seeds = {"GPT": 160 // share, "convnet": 300 // share}, range(3 if quick else 5)
    result["steps"] = steps
    plan = [(task, name, seed) for task in TASKS for name in BY_NAME for seed in seeds]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=start_worker) as executor:
        running = [executor.submit(final_loss, *run, steps[run[0]]) for run in plan]
        losses: dict[str, dict[str, list[float]]] = {task: {name: [] for name in BY_NAME} for task in TASKS}
        for (task, name, _), future in zip(plan, running, strict=True):
            losses[task][name].append(future.result())
    result["losses"] = losses
    return result


def sections(share: int) -> Iterator[tuple[str, Iterator[tuple[str, Any]]]]:
    """Each section with its rows, by contestant."""
    yield "small updates", ((each.name, small_updates(each, 10_000 // share)) for each in CONTESTANTS)
    yield "averages", ((each.name, averages(each, 2_000 // share)) for each in CONTESTANTS)
    sigmas = (0.0, 1.5, 3.0)
    yield (
        "different scales",
        (
            (each.name, {str(sigma): different_scales(of_states(each), sigma, 400 // share) for sigma in sigmas})
            for each in CONTESTANTS
        ),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="runs everything, far too briefly for meaningful results")
    parser.add_argument("--out", type=Path, default=environment.ROOT / "bench" / "results" / "precision")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the page from precision.json")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="training runs at once")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "precision.json"
    if not options.report:
        file.write_text(json.dumps(measure(options.quick, options.jobs), indent=1) + "\n")
    print(precision_report.write(options.out, json.loads(file.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
