"""`python -m fused_optim`: which backends work on this machine, and why the others do not. With --model or
--state-dict: the cost of an optimizer step."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from . import __version__, backends
from .backends import trial
from .cost import state_dicts, step_cost
from .cost.shapes import MODELS
from .engine import machine, modules
from .engine.masters import Kind
from .optim.options import Rounding

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def devices() -> str:
    if not torch.cuda.is_available():
        return "CPU only"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def print_machine() -> None:
    facts = {
        "fused_optim": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})",
        "triton": machine.triton_version() or "not installed",
        "devices": devices(),
        "instruction set": modules.instruction_set() or "C++ kernel not built",
        "change detector": modules.poll_title(),
        "threads": str(torch.get_num_threads()),
    }
    reasons = backends.available()
    if torch.cuda.is_available():  # as in a step, kernels are compiled and launched on trial
        reasons |= {name: trial.why_not(name, torch.device("cuda", 0)) for name in backends.ORDER["cuda"]}
    facts |= {f"backend {name}": reason or "ok" for name, reason in reasons.items()}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        found = next((name for name in backends.ORDER[kind] if reasons[name] is None), "reference")
        print(f"{'auto on ' + kind:{width}}  {found}")


def in_bytes(count: int) -> str:
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min((len(str(count)) - 1) // 3, len(units) - 1)
    return f"{count / 1000**power:.4g} {units[power]}"


def in_time(seconds: float) -> str:
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], 10)
    for first, *others in rows:
        cells = (f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    print()


def print_cost(cost: step_cost.Cost) -> None:
    print_rows([[name, f"{getattr(cost, name):,}"] for name in ("tensors", "elements", "groups")])

    per_element = 1 / max(cost.elements, 1)
    rows = [["memory", "", "bytes per element"]]
    for name in ("params", "grads", "states", "tables"):
        count = getattr(cost, name)
        rows.append([name, in_bytes(count), f"{count * per_element:.4g}"])
    rows += [[""] * 3, ["moved per step", in_bytes(cost.moved), f"{cost.moved * per_element:.4g}"]]
    print_rows(rows)

    rows = [["launches per step", "ours", "torch fused"]]
    for kernel in step_cost.TORCH_LAUNCHES:
        if cost.torch_launches is None:
            torchs = "has none"
        else:
            updates, counts = cost.torch_launches[kernel.title]
            torchs = f"{updates:,}" + (f" + {counts:,} to count steps" if counts else "")
        rows.append([f"GPU, torch for {kernel.title}", str(cost.launches), torchs])
    loops = "has none" if cost.torch_loops is None else f"{cost.torch_loops:,}"
    rows.append(["CPU, parallel loops", str(cost.loops), loops])
    print_rows(rows)


def print_times(moved: int, gbps: float | None) -> None:
    rows = [["expected", "time of a step", "GB/s", "measured by"]]
    if gbps is not None:
        rows.append(["given", in_time(moved / gbps / 1e9), f"{gbps:,.4g}", ""])
    else:
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        for device in [*gpus, torch.device("cpu")]:
            try:
                speed, how = step_cost.bandwidth(device)
                rows.append([str(device), in_time(moved / speed), f"{speed / 1e9:,.4g}", how])
            except RuntimeError as error:  # not enough memory
                rows.append([str(device), "", "", f"not measured: {str(error).partition(chr(10))[0]}"])
    print_rows(rows)
    print("The expected time is bytes over bandwidth, for tensors that are not in a cache. Add the time of the host.")


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m fused_optim",
        description="Prints which backends work on this machine. With a model: prints the cost of an optimizer step.",
    )
    model = made.add_mutually_exclusive_group()
    model.add_argument("--model", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    model.add_argument(
        "--state-dict",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="checkpoints of torch.save or .safetensors files; several files are parts of one model",
    )
    names = ", ".join(step_cost.OPTIMIZERS)
    made.add_argument("--optimizer", choices=step_cost.OPTIMIZERS, default="adamw", metavar="NAME", help=names)
    made.add_argument("--dtype", choices=DTYPES, help="of params and gradients; default: float32, or that of the files")
    made.add_argument(
        "--state-dtype",
        choices=(*DTYPES, "compact"),
        help="of states; default: that of the params, float32 with master weights; compact: packed in 1 and 2 bytes",
    )
    made.add_argument(
        "--master-weights", choices=get_args(Kind), help="of bfloat16 params, in 2 bytes (exact) or 1 byte (24bit) more"
    )
    made.add_argument("--rounding", choices=get_args(Rounding), help="of bfloat16 tensors; default: nearest")
    made.add_argument(
        "--groups",
        choices=step_cost.GROUPS,
        default="one",
        help="one; decay: a second group for biases and params with fewer than two dimensions; each: one per param",
    )
    made.add_argument("--amsgrad", action="store_true", default=None)
    made.add_argument("--momentum", type=float, metavar="NUMBER", help="of SGD and SGDW; default: 0")
    made.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="clip by the norm of all gradients; default: on for LAMB, else off",
    )
    made.add_argument("--ema", action="store_true", help="with a moving average of the weights")
    made.add_argument("--gbps", type=positive, metavar="NUMBER", help="the bandwidth in GB/s; default: measured")
    return made


def class_options(options: argparse.Namespace) -> dict[str, Any]:
    """The given options of the optimizer's class.

    Raises:
        ValueError: the class does not have an option.
    """
    given = {key: getattr(options, key) for key in ("amsgrad", "momentum") if getattr(options, key) is not None}
    for key in given:
        if options.optimizer not in (takers := step_cost.takers(key)):
            raise ValueError(f"--{key} is an option of {', '.join(takers)}, but the optimizer is {options.optimizer}")
    if options.clip is not None:
        given["max_grad_norm"] = 1.0 if options.clip else None
    if options.ema:
        given["ema_decay"] = 0.999
    if options.state_dtype:
        given["state_dtype"] = DTYPES.get(options.state_dtype, options.state_dtype)
    given |= {key: getattr(options, key) for key in ("master_weights", "rounding") if getattr(options, key)}
    return given


def print_model(options: argparse.Namespace) -> None:
    title, notes = options.model, list[str]()
    if options.model:
        params = step_cost.on_meta(MODELS[options.model](), torch.float32)
    else:
        title = " ".join(path.name for path in options.state_dict)
        params, notes = state_dicts.read(options.state_dict)
    if options.dtype:
        params = {name: torch.empty_like(param, dtype=DTYPES[options.dtype]) for name, param in params.items()}
    optimizer = step_cost.prepare(params, options.optimizer, options.groups, **class_options(options))
    cost = step_cost.cost_of(optimizer)

    dtypes = " and ".join(sorted({str(param.dtype).removeprefix("torch.") for param in params.values()}))
    said = {
        dtypes: True,
        f"{options.master_weights} master weights": any(row.low is not None for row in step_cost.rows_of(optimizer)),
        "compact states": options.state_dtype == "compact",
        f"states in {options.state_dtype}": options.state_dtype in DTYPES,
        "dithered rounding": options.rounding == "dithered",
        "amsgrad": options.amsgrad,
        f"momentum {options.momentum}": options.momentum,
        "gradients clipped": cost.clips,
        "with an average of the weights": options.ema,
    }
    print(f"A step of {type(optimizer).__name__} on {title}: {', '.join(text for text, true in said.items() if true)}")
    print("".join(f"{note}\n" for note in notes))
    print_cost(cost)
    print_times(cost.moved, options.gbps)


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if options.model or options.state_dict:
        try:
            print_model(options)
        except (ValueError, TypeError) as error:
            made.error(str(error))
    elif options != made.parse_args([]):
        made.error("these options describe a step of a model, so one of --model and --state-dict must be given")
    else:
        print_machine()
    return 0


if __name__ == "__main__":
    sys.exit(main())
