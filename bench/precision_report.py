"""The page and the plots of bench/precision.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from study_plots import DARK, FIRST, SECOND, tidy
from study_statistics import Difference, difference

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]

INTRODUCTION = """\
# What formats are worth

`{command}` at commit {commit}, on {device}, torch {torch}. AdamW with betas (0.9, 0.999). *Masters* are
`master_weights`, *compact* is `state_dtype="compact"`. Our rows are steps of the real kernels. The rows of FlashOptim
0.1.4 and bitsandbytes 0.50.2 are computed by their formulas: FlashOptim's quantized states need a GPU, and a step of
bitsandbytes takes milliseconds per tensor on a CPU."""

MEMORY = """\
## Memory

Bytes per param. *Stored* is counted: params and states. The others are measured: the highest resident memory of a
process in its second step, less that before the model was made. They contain params, states and gradients, with
gradient release those of one layer of 24."""

SMALL = """\
## Small updates

10,000 steps, each of 1e-5, on weights from 0.5 to 1. The error of the sum of all updates in the master weights, as a
share of it: the mean over the weights, and the largest."""

AVERAGES = """\
## Averages

`exp_avg_sq` divided by its exact value, the mean over 1,024 elements, after each of three phases of 2,000 steps:
Gaussian gradients, gradients half as large, gradients of 0. Exact is 1."""

SCALES = """\
## Gradients of different scales

Each element's gradients have a scale of their own, log-normal with this σ, in random order. The cosine of the update
with the exact one, and the largest element of the update over lr, in steps 201 to 400. Params are float32 here."""

TRAINING = """\
## Training

A GPT (2 layers of 64, characters of Python's documentation, {GPT} steps) and a convolutional net (8x8 digits, {convnet}
steps), with warm-up and cosine decay. The validation loss at the end, mean over the seeds, and its difference from
float32 with the same seed: mean and 95 % interval (Student's t). The forward pass is in float32 with the weights that
the params show, so runs differ in what the optimizer stores alone."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_name(result: Result, cells: Callable[[str], Sequence[str]]) -> list[list[str]]:
    return [[name, *cells(name)] for name in result["contestants"]]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:+.2f} %"


def against_base(result: Result, task: str, name: str) -> Difference | None:
    """By how much the base's loss is less, paired by seed; None for the base."""
    losses = result["losses"][task]
    if name == result["base"]:
        return None
    base, own = (dict(enumerate(losses[who])) for who in (result["base"], name))
    return difference(base, own)


def interval(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:+.4f} ({found.mean - found.half:+.4f} to {found.mean + found.half:+.4f})"


# ---- plots


def save(figure: plt.Figure, out: Path, name: str) -> str:
    figure.savefig(out / f"{name}.svg")
    plt.close(figure)
    return f"{name}.svg"


def plot_training(out: Path, result: Result) -> str:
    """The difference of each contestant's loss from the base's: a dot per seed, and the 95 % interval of the mean."""
    tasks = list(result["losses"])
    names = [name for name in result["contestants"] if name != result["base"]]
    figure, axes = plt.subplots(1, len(tasks), sharey=True, squeeze=False, figsize=(9, 4), layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        losses = result["losses"][task]
        for line, name in enumerate(names):
            found = against_base(result, task, name)
            assert found is not None
            seeds = [own - base for own, base in zip(losses[name], losses[result["base"]], strict=True)]
            axis.scatter(seeds, [line] * len(seeds), s=14, color=FIRST, zorder=2)
            axis.errorbar(found.mean, line, xerr=found.half, fmt="|", color=SECOND, capsize=3, markersize=9, zorder=3)
        axis.axvline(0, color=DARK, linewidth=0.8)
        axis.set_title(f"{task}: validation loss minus that of float32", loc="left", fontsize=10)
        axis.set_yticks(range(len(names)), names)
        tidy(axis, "x")
    axes[0][0].invert_yaxis()
    return save(figure, out, "training")


def plot_scales(out: Path, result: Result) -> str:
    """Cosine of the update with the exact one, and its largest element, by the spread of the gradients' scales."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colours = plt.get_cmap("tab10")
    for place, (name, rows) in enumerate(result["different scales"].items()):
        sigmas = [float(sigma) for sigma in rows]
        for axis, key in zip(axes, ("cosine", "largest"), strict=True):
            axis.plot(sigmas, [rows[s][key] for s in rows], "o-", color=colours(place), label=name, markersize=4)
    axes[0].set_ylabel("cosine with the exact update")
    axes[1].set_ylabel("largest element of the update / lr")
    axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("sigma of the log of the gradients' scales")
        tidy(axis, "both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return save(figure, out, "scales")


def plot_memory(out: Path, result: Result) -> str:
    names = list(result["memory"])
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for way, colour, offset in (("plain", FIRST, -0.2), ("release", SECOND, 0.2)):
        values = [result["memory"][name][way] for name in names]
        label = "plain step" if way == "plain" else "with gradient release"
        axis.barh([line + offset for line in range(len(names))], values, height=0.36, color=colour, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("bytes per param in memory, measured: params, gradients, states")
    tidy(axis, "x")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return save(figure, out, "memory")


# ---- page


def write(out: Path, result: Result) -> Path:
    """Writes precision.md and its plots. Returns the page's path."""
    about = result["about"]
    small, averages, scales = (result[name] for name in ("small updates", "averages", "different scales"))
    tasks = list(result["losses"])
    sigmas = list(next(iter(scales.values())))
    memory = result["memory"]
    about_text = INTRODUCTION.format(
        command=about["command"], commit=about["commit"][:12], device=about["device"], torch=about["torch"]
    )
    sections = {
        about_text: None,
        MEMORY: table(
            ["", "stored", "measured", "measured, with gradient release"],
            by_name(
                result,
                lambda name: [
                    f"{result['contestants'][name]:.3g}",
                    *(f"{memory[name][way]:.2f}" if name in memory else "" for way in ("plain", "release")),
                ],
            ),
        ),
        f"![Memory]({plot_memory(out, result)})": None,
        SMALL: table(
            ["", "mean", "largest"],
            by_name(result, lambda name: [percent(small[name]["mean"]), percent(small[name]["largest"])]),
        ),
        AVERAGES: table(
            ["", "Gaussian", "half as large", "zero"],
            by_name(result, lambda name: [number(averages[name][key]) for key in ("gaussian", "half", "zero")]),
        ),
        SCALES: table(
            ["", *(f"cosine, σ = {sigma}" for sigma in sigmas), *(f"largest, σ = {sigma}" for sigma in sigmas)],
            by_name(
                result,
                lambda name: [
                    *(f"{scales[name][sigma]['cosine']:.4f}" for sigma in sigmas),
                    *(number(scales[name][sigma]["largest"]) for sigma in sigmas),
                ],
            ),
        ),
        f"![Scales]({plot_scales(out, result)})": None,
        TRAINING.format(**result["steps"]): table(
            ["", *(text for task in tasks for text in (task, f"{task}, minus float32"))],
            by_name(
                result,
                lambda name: [
                    text
                    for task in tasks
                    for text in (
                        f"{fmean(result['losses'][task][name]):.4f}",
                        interval(against_base(result, task, name)),
                    )
                ],
            ),
        ),
        f"![Training]({plot_training(out, result)})": None,
    }
    parts = [part for text, rows in sections.items() for part in (text, rows) if part is not None]
    page = out / "precision.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page
