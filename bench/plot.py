"""Plots how many times as fast as the baseline each peer is, by case, with the floor marked."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from measure import FLOOR, Measured

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BAR = 0.22  # inches
OURS = ["#c8102e", "#ff7f50", "#8c1c13", "#f4a582"]
OTHERS = ["#9aa5b1", "#c3cad1", "#5b6b7a", "#7b9acc", "#b5c7a3", "#d9c8a9", "#8fb8b0", "#b7a3c7", "#d1a7a0", "#6d8f6d"]
FLOOR_COLOUR = "#111111"


def draw(path: Path, results: list[Measured], title: str) -> None:
    """Draws one group of horizontal bars per case. A case whose baseline was not timed has no ratio and is left out."""
    results = [measured for measured in results if measured.baseline in measured.timed]
    baselines = list(dict.fromkeys(measured.baseline for measured in results))
    names = list(
        dict.fromkeys(name for measured in results for name in measured.timed if name not in (FLOOR, measured.baseline))
    )
    mine = [name for name in names if name.startswith("ours")]
    colours = dict(zip(mine, OURS * 3, strict=False)) | dict(
        zip([n for n in names if n not in mine], OTHERS * 3, strict=False)
    )

    lines = sum(len(measured.timed) - 1 for measured in results) + len(results)
    figure, axis = plt.subplots(figsize=(9.5, max(2.6, BAR * lines + 1.5)), layout="constrained")
    bottom = 0.0
    ticks: list[float] = []
    labels: list[str] = []
    ratios = [1.0]
    for measured in results:
        top = bottom
        for name in [n for n in names if n in measured.timed and n != measured.baseline]:
            ratio = measured.timed[name].speed(measured.timed[measured.baseline]) or float("nan")
            ratios.append(ratio)
            axis.barh(bottom, ratio - 1, left=1, height=0.8, color=colours[name], label=name, zorder=2)
            weight = "bold" if name in mine else "normal"
            side, pad = ("left", 4) if ratio >= 1 else ("right", -4)
            axis.annotate(
                f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}",
                (ratio, bottom),
                xytext=(pad, 0),
                textcoords="offset points",
                va="center",
                ha=side,
                fontsize=8,
                fontweight=weight,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
                zorder=4,
            )
            bottom += 1
        floor = measured.timed[FLOOR].speed(measured.timed[measured.baseline]) or float("nan")
        ratios.append(floor)
        axis.plot(
            [floor, floor],
            [top - 0.55, bottom - 0.45],
            color=FLOOR_COLOUR,
            linewidth=1.6,
            linestyle=(0, (3, 1.5)),
            zorder=3,
            label=FLOOR,
        )
        ticks.append((top + bottom - 1) / 2)
        against = f"\nagainst {measured.baseline}" if len(baselines) > 1 else ""
        labels.append(str(measured.config).replace(", ", "\n", 1) + against)
        bottom += 1

    axis.axvline(1, color="#333333", linewidth=0.9, zorder=1)
    axis.set_xscale("log")
    marks = [
        mark
        for mark in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
        if min(ratios) / 2 <= mark <= max(ratios) * 2
    ]
    axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axis.minorticks_off()
    axis.set_xlim(min(0.7, min(ratios) / 1.35), max(ratios) * 1.35)
    axis.set_yticks(ticks, labels)
    axis.invert_yaxis()
    axis.grid(axis="x", color="#e3e3e3", linewidth=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel(f"times as fast as {' or '.join(baselines)} (log scale; above 1 is faster)")
    axis.set_title(title, loc="left", fontsize=11)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    handles[f"{FLOOR} (same bytes, no arithmetic)"] = handles.pop(FLOOR)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(5, len(handles)),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)
