"""The plots of the study."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Literal

import matplotlib
from study_claims import METRICS, Results, epochs_to_target
from study_plan import SCHEDULES
from study_statistics import spread

matplotlib.use("Agg")
import matplotlib.patches
import matplotlib.pyplot as plt
import matplotlib.ticker

FIRST, SECOND, DARK, LIGHT = "#9aa5b1", "#c8102e", "#1f2d3d", "#e3e3e3"
COLOURS = dict(zip(SCHEDULES, ("#c8102e", "#5b6b7a", "#d9a441"), strict=True))


def tidy(axis: plt.Axes, grid: Literal["x", "both"]) -> None:
    axis.grid(axis=grid, color=LIGHT, linewidth=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def save(figure: plt.Figure, out: Path, name: str) -> str:
    figure.savefig(out / name, dpi=140)
    plt.close(figure)
    return name


def contest(out: Path, results: Results, name: str) -> str:
    """One line per optimizer: a dot per seed and a stroke at the mean, without and with augmentation or pointer."""
    who = results.contestants(name)
    figure, axis = plt.subplots(figsize=(8, 1.1 + 0.42 * len(who)), layout="constrained")
    for metric, colour, offset in zip(METRICS[name], (FIRST, SECOND), (-0.14, 0.14), strict=True):
        for line, (optimizer, variant) in enumerate(who):
            values = list(results.values(name, optimizer, metric, variant).values())
            label = metric if line == 0 else None
            axis.scatter(values, [line + offset] * len(values), s=22, color=colour, alpha=0.7, label=label, zorder=2)
            if values:
                axis.plot([fmean(values)] * 2, [line + offset - 0.15, line + offset + 0.15], color=DARK, zorder=3)
    axis.set_yticks(range(len(who)), [" ".join(filter(None, pair)) for pair in who])
    axis.invert_yaxis()
    measure = METRICS[name][0]
    axis.set_xlabel(f"{measure}{', %' if measure == 'error' else ''} on the test split; less is better")
    tidy(axis, "x")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return save(figure, out, f"{name}.png")


def schedules(out: Path, results: Results) -> str:
    """One row per optimizer. Left: error by epoch in the longest runs, averaged over seeds, and the final errors of all
    lengths. Right: epochs to the target, a dot per seed."""
    runs = [(run, outcome) for run, outcome in results.of("schedules", "test") if "curve" in outcome]
    optimizers = list(dict.fromkeys(run.optimizer for run, _ in runs))
    targets = epochs_to_target(results)
    figure, rows = plt.subplots(
        max(1, len(optimizers)), 2, squeeze=False, figsize=(9, 3.1 * max(1, len(optimizers))), layout="constrained"
    )
    for (left, right), optimizer in zip(rows, optimizers, strict=False):
        mine = [(run, outcome) for run, outcome in runs if run.optimizer == optimizer]
        longest = max(run.epochs for run, _ in mine)
        for schedule in SCHEDULES:
            colour = COLOURS[schedule]
            curves = [outcome["curve"] for run, outcome in mine if (run.schedule, run.epochs) == (schedule, longest)]
            if curves:
                mean = [fmean(errors) for errors in zip(*curves, strict=True)]
                left.plot(range(1, longest + 1), mean, color=colour, label=schedule, linewidth=1.4)
            for epochs in sorted({run.epochs for run, _ in mine if run.schedule == schedule}):
                ends = [o["curve"][-1] for run, o in mine if (run.schedule, run.epochs) == (schedule, epochs)]
                bar = spread(ends) if len(ends) > 1 else 0.0
                left.errorbar(epochs, fmean(ends), bar, fmt="o", color=colour, markersize=5, capsize=2, linewidth=1)
        left.set_yscale("log")
        left.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        left.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        left.set_xticks(sorted({run.epochs for run, _ in mine}))
        left.set_ylabel("test error, %")
        left.set_xlabel("epoch")
        left.set_title(f"{optimizer}: dots are final errors of runs of that length", loc="left", fontsize=10)
        left.legend(frameon=False, fontsize=9)
        tidy(left, "both")
        if optimizer in targets:
            target, reached = targets[optimizer]
            left.axhline(target, color=DARK, linewidth=0.8, linestyle=(0, (3, 2)))
            for line, (schedule, by_seed) in enumerate(reached.items()):
                values = list(by_seed.values())
                places = [line + 0.07 * (number - (len(values) - 1) / 2) for number in range(len(values))]
                right.scatter(values, places, color=COLOURS[schedule], s=24, zorder=2)
            right.axvline(longest + 0.5, color=LIGHT)
            right.set_xlim(0, longest + 2)
            right.set_yticks(range(len(reached)), list(reached))
            right.invert_yaxis()
            right.set_xlabel(f"epochs to an error of {target:.2f} % (right of the line: not reached)")
            tidy(right, "x")
        else:
            right.set_axis_off()
    return save(figure, out, "schedules.png")


def cost(out: Path, costs: dict[tuple[str, str], dict[str, float]]) -> str:
    """Milliseconds of one optimizer step: torch's default, torch's fused, and ours. One column per task."""
    bars = (("torch", FIRST), ("torch fused", "#5b6b7a"), ("ours", SECOND))
    tasks = list(dict.fromkeys(task for task, _ in costs))
    optimizers = list(dict.fromkeys(optimizer for _, optimizer in costs))
    size = 2.2 + 2.0 * len(tasks), 1.2 + 0.45 * len(optimizers)
    figure, axes = plt.subplots(1, len(tasks), squeeze=False, sharey=True, figsize=size, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for (_, optimizer), found in ((who, found) for who, found in costs.items() if who[0] == task):
            present = [(peer, colour) for peer, colour in bars if peer in found]
            for number, (peer, colour) in enumerate(present):
                place = optimizers.index(optimizer) + 0.26 * (number - (len(present) - 1) / 2)
                axis.barh(place, found[peer], height=0.24, color=colour, zorder=2)
        axis.set_title(task, fontsize=10)
        axis.set_yticks(range(len(optimizers)), optimizers)
        tidy(axis, "x")
    axes[0][0].invert_yaxis()
    figure.supxlabel("milliseconds per optimizer step, median", fontsize=10)
    figure.legend(
        handles=[matplotlib.patches.Patch(color=colour, label=peer) for peer, colour in bars],
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return save(figure, out, "cost.png")
