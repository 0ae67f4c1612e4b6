"""Times the whole update between backward() and the next forward, against the same work composed of torch's functions.

    python bench/update.py                        # every case and feature on the CPU, into bench/results/<machine>/
    python bench/update.py --device cuda --case gpt2-124m --feature clip

Before the timing every peer's params are compared with those of torch's composition. Peers take turns. Files are
written after each case; --resume skips the cases that they already hold.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clocks import CpuClock, CudaClock, Step
from environment import ROOT, describe, device_name, folder_name
from family import LR, WEIGHT_DECAY
from measure import progress, reason_of
from report import write_whole
from shapes import CASES
from torch.nn.utils import clip_grad_norm_
from workload import DTYPES, Config, Workload

sys.path.append(str(ROOT))

MAX_NORM = 0.5  # below the norm of the gradients in every case, so that clipping scales them
SCALE = 1024.0
BASELINE = "torch"
# (case, dtype, feature): ours must be this many times as fast as torch's composition
GOALS = {("resnet50", "float32", "clip"): 1.8, ("gpt2-124m", "bf16", "clip"): 2.2} | {
    (case, dtype, "clip+ema"): 2.0 for case in ("resnet50", "gpt2-124m") for dtype in ("float32", "bf16")
}

# The work besides the step:
#   clip         clips by the global norm
#   unscale      GradScaler's unscaling and overflow check, before clipping
#   accumulate   divides gradients that are sums over micro-batches
#   skip         skips the step unless all gradients are finite
#   ema          updates the moving average of the weights after the step
#   clip alone   clips in place without a step, by torch's clip_grad_norm_ and by ours
CLIP_ALONE = "clip alone"
FEATURES = (
    "step",
    "clip",
    "unscale+clip",
    "accumulate+clip",
    "clip+skip",
    "ema",
    "clip+ema",
    "accumulate+clip+skip+ema",
    CLIP_ALONE,
)
EMA_DECAY = 0.999


def torch_update(workload: Workload, feature: str, **options: Any) -> Step:
    """The update composed of torch's functions, as in training loops."""
    optimizer = torch.optim.AdamW(workload.groups(), lr=LR, **options)
    foreach = True if options.get("foreach") else None
    scaler = torch.amp.GradScaler(workload.device.type, init_scale=SCALE, growth_interval=1 << 30)
    scaler.scale(torch.zeros((), device=workload.device))
    scale = torch.full((), 1 / SCALE, device=workload.device)
    found = torch.zeros((), device=workload.device)

    params = [param.detach() for param in workload.params]
    averages = [param.clone() for param in params] if "ema" in feature else []

    def update() -> None:
        if "unscale" in feature:
            torch._amp_foreach_non_finite_check_and_unscale_(workload.grads, found, scale)
        if "accumulate" in feature:
            torch._foreach_div_(workload.grads, SCALE)
        if "clip" in feature:
            norm = clip_grad_norm_(workload.params, MAX_NORM, foreach=foreach)
            if feature == CLIP_ALONE:
                return
            if "skip" in feature and not norm.isfinite():  # waits for the device, as in training loops
                return
        optimizer.step()
        if averages:  # as in torch.optim.swa_utils.get_ema_multi_avg_fn
            torch._foreach_lerp_(averages, params, 1 - EMA_DECAY)

    return update


def ours(workload: Workload, feature: str) -> Step:
    from fused_optim import FusedAdamW
    from fused_optim import clip_grad_norm_ as clip

    param_dtype, state_dtype = DTYPES[workload.config.dtype]
    optimizer = FusedAdamW(
        workload.groups(),
        lr=LR,
        state_dtype=None if state_dtype == param_dtype else state_dtype,
        max_grad_norm=MAX_NORM if "clip" in feature else None,
        skip_nonfinite="skip" in feature,
        ema_decay=EMA_DECAY if "ema" in feature else None,
        ema_dtype=param_dtype if "ema" in feature else None,  # as in torch's composition
    )
    scale = torch.full((), SCALE, device=workload.device)
    found = torch.zeros((), device=workload.device)

    def update() -> None:
        if "unscale" in feature:
            # For an optimizer that scales by itself, GradScaler checks for overflow with a scale of 1.
            torch._amp_foreach_non_finite_check_and_unscale_(workload.grads, found, torch.ones_like(scale))
            optimizer.grad_scale, optimizer.found_inf = scale, found  # type: ignore[attr-defined]
            optimizer.step()
        elif "accumulate" in feature:
            optimizer.step(grad_scale=SCALE)
        elif feature == CLIP_ALONE:
            clip(workload.params, MAX_NORM)
        else:
            optimizer.step()

    return update


PEERS: dict[str, Callable[[Workload, str], Step]] = {
    "torch": lambda workload, feature: torch_update(workload, feature, fused=True),
    "torch-foreach": lambda workload, feature: torch_update(workload, feature, foreach=True),
    "ours": ours,
}


def after_one(workload: Workload, step: Step, feature: str) -> list[torch.Tensor]:
    """The params after one update; for "clip alone" the gradients. Restores params and gradients."""
    kept = copy.deepcopy([*[p.detach() for p in workload.params], *workload.grads])
    step()
    changed = workload.grads if feature == CLIP_ALONE else workload.params
    values = [x.detach().double() for x in changed]
    for tensor, value in zip([*[p.detach() for p in workload.params], *workload.grads], kept, strict=True):
        tensor.copy_(value)
    return values


def check(workload: Workload, steps: dict[str, Step], feature: str) -> None:
    """Compares each peer's result of the first update with that of torch's composition.

    Raises:
        ArithmeticError: they differ.
    """
    eps, slack = torch.finfo(DTYPES[workload.config.dtype][0]).eps, 0.1 * LR
    if feature == CLIP_ALONE:  # on the CPU torch sums squares in float32: off by 1e-3 for 40 million elements
        eps, slack = max(eps, 1e-3), torch.finfo(torch.float32).tiny
    with torch.no_grad():
        truth = after_one(workload, steps[BASELINE], feature)
        for name in steps.keys() - {BASELINE}:
            for got, want in zip(after_one(workload, steps[name], feature), truth, strict=True):
                error = ((got - want).abs() / (eps * want.abs() + slack)).max().item()
                if not error <= 2:
                    raise ArithmeticError(f"{name}: the error must be at most 2 tolerances, but is {error:.3g}")


def measure(config: Config, feature: str, device: torch.device, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    workload = Workload(config, device)
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    for name, build in PEERS.items():
        try:
            candidate = build(workload, feature)
            check(workload, {BASELINE: steps.get(BASELINE, candidate), name: candidate}, feature)
            steps[name] = candidate
        except Exception as error:  # the other peers are still timed
            if name == BASELINE:
                raise
            skipped[name] = reason_of(error)
            progress(f"{config}, {feature}: {name} is left out, {skipped[name]}", done=True)
    clock = CudaClock(device) if device.type == "cuda" else CpuClock(device)
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    kept = [grad.clone() for grad in workload.grads]
    gc.disable()
    for turn in range(rounds + 1):
        progress(f"{config}, {feature}: round {turn} of {rounds}")
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            torch._foreach_copy_(workload.grads, kept)  # torch's composition writes to them
            times = clock.time(steps[name], False)
            if turn:  # the first round makes states and tables, so it does not count
                samples[name].append(times["ms"])
    gc.enable()
    progress(f"{config}, {feature}: done", done=True)
    speed = None
    if "ours" in samples:
        speed = statistics.median(a / b for a, b in zip(samples[BASELINE], samples["ours"], strict=True))
    return {
        "case": config.case,
        "dtype": config.dtype,
        "feature": feature,
        "median_ms": {name: statistics.median(values) for name, values in samples.items()},
        "speed_against_torch": speed,
        "goal": GOALS.get((config.case, config.dtype, feature)),
        "samples_ms": samples,
        "skipped": skipped,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| case | dtype | update | torch | torch foreach | ours | ours : torch | goal |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        ms = result["median_ms"]
        times = " | ".join(f"{ms[name]:.2f} ms" if name in ms else "left out" for name in PEERS)
        speed = result["speed_against_torch"]
        lines.append(
            f"| {result['case']} | {result['dtype']} | {result['feature']} | {times} "
            f"| {'' if speed is None else f'{speed:.2f}'} | {result['goal'] or ''} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["resnet50", "gpt2-124m"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bf16"])
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--resume", action="store_true", help="skip the cases that update.json already holds")
    parser.add_argument("--out", type=Path, help="folder for update.json, update.md (default: bench/results/<machine>)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("Nothing was measured: torch finds no GPU on this machine.", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    folder = options.out or ROOT / "bench" / "results" / folder_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "update.json"
    results = json.loads(file.read_text())["results"] if options.resume and file.exists() else []
    failed = False
    for case, dtype, feature in itertools.product(options.case, options.dtype, options.feature):
        if any((case, dtype, feature) == (one["case"], one["dtype"], one["feature"]) for one in results):
            continue
        try:
            results.append(measure(Config(case, dtype), feature, device, options.rounds))
        except Exception as error:  # the other cases still run
            failed = True
            print(f"{case}, {dtype}, {feature}: {reason_of(error)}", file=sys.stderr, flush=True)
            continue
        print(table(results[-1:]).splitlines()[-1], flush=True)
        write(folder, results, device, options.rounds)
    return 1 if failed else 0


def write(folder: Path, results: list[dict[str, Any]], device: torch.device, rounds: int) -> None:
    about = describe(device)
    write_whole(folder / "update.json", json.dumps({"about": about, "results": results}, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    title = f"# The whole update on {device_name(device)}: AdamW, weight decay {WEIGHT_DECAY}"
    text = f"{title}\n\n{facts}\n\nMedians over {rounds} rounds. Peers take turns.\n\n{table(results)}\n"
    write_whole(folder / "update.md", text)


if __name__ == "__main__":
    sys.exit(main())
