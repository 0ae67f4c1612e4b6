"""Writes the figures as a table, as JSON and as a Markdown page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from family import AMSGRAD, BASELINES
from measure import FLOOR, Measured, Timed
from peers import PEERS
from suites import Goal, verdicts
from workload import Config

COLUMNS = [
    "case",
    "peer",
    "median ms",
    "quartiles",
    "min",
    "mean",
    "x {baseline}",
    "GB/s",
    "of floor",
    "host µs",
    "error",
]
GPU_COLUMNS = ["device ms", "graph ms"]

METHOD = """\
- Rounds: each round times every peer once, in random order, on the same memory, with random data.
- "x {baseline}" and "of floor": how many times as fast, as the median over the rounds of the ratio within a round.
- GB/s: each operand counts once per read and once per write, in the dtypes of the case, whatever a peer moves.
- Floor: the fastest of several bandwidth probes, which move the bytes of a step without arithmetic in the same rounds.
  Here: {floor}.
- Caches: flushed before each step, except in cases marked hot.
{host}
- Error: the largest deviation of the params from the optimizer in float64 after three steps, divided by the tolerance
  that bench/workload.py defines. A peer above 1 is not timed."""

BASELINE = f"The baseline of each case is the first of {', '.join(BASELINES)} that passes the check of its numbers."

CPU_HOST = "- Host µs: the time of a step over the same number of tensors with one element each."
GPU_HOST = """\
- ms: includes every wait of the device for the host. Device ms does not. "of floor" compares device ms.
- Host µs: the time until step() returns."""


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def column_name(results: list[Measured]) -> str:
    """The baseline's name if all cases have the same, else "baseline"."""
    names = {measured.baseline for measured in results if measured.baseline in measured.timed}
    return names.pop() if len(names) == 1 else "baseline"


def notes(results: list[Measured]) -> str:
    """The notes on the peers that were timed, one line each."""
    timed = dict.fromkeys(
        name for measured in results if measured.config.optimizer not in AMSGRAD for name in measured.timed
    )
    return "\n".join(f"- {name}: {PEERS[name].note}" for name in timed if name in PEERS and PEERS[name].note)


def row(measured: Measured, timed: Timed, gpu: bool) -> list[str]:
    median = timed.median() or float("nan")
    first, third = timed.quartiles()
    name = timed.name + (f" ({timed.backend})" if timed.backend and not timed.name.endswith(timed.backend) else "")
    cells = [
        str(measured.config),
        name,
        number(median, 4),
        f"{number(first)} to {number(third)}",
        number(timed.best()),
        number(timed.mean()),
        number(timed.speed(measured.timed.get(measured.baseline))),
        number(measured.bytes / median / 1e6),
        number(timed.share_of(measured.timed[FLOOR])),
        number(timed.host_us),
        number(timed.error, 2),
    ]
    return cells + ([number(timed.median("device_ms"), 4), number(timed.median("graph_ms"), 4)] if gpu else [])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is also aligned as plain text: text columns to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    left = [all(not line[i][:1].isdigit() or " " in line[i] for line in rows if line[i]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w if to_left else w - 1) + ("" if to_left else ":") for w, to_left in zip(widths, left, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def table(results: list[Measured], gpu: bool) -> str:
    header = [column.format(baseline=column_name(results)) for column in COLUMNS] + (GPU_COLUMNS if gpu else [])
    rows = [row(measured, timed, gpu) for measured in results for timed in measured.timed.values()]
    return markdown(header, rows)


def against_table(results: list[Measured], other: str) -> str:
    """Compares ours with another commit: how many times as fast, by the median ratio and by the minima."""
    header = ["case", f"{other}, median ms", "ours, median ms", "speed-up, by rounds", "speed-up, by minima"]
    rows = []
    for measured in results:
        theirs = measured.timed.get(other)
        for name, timed in measured.timed.items():
            best = timed.best(), theirs.best() if theirs else None
            if theirs is None or name == other or not name.startswith("ours") or None in best:
                continue
            fastest = (best[1] or 0.0) / (best[0] or 1.0)
            figures = [number(value) for value in (theirs.median(), timed.median(), timed.speed(theirs), fastest)]
            rows.append([str(measured.config), *figures])
    return markdown(header, rows) if rows else ""


def bandwidth(results: list[Measured]) -> str:
    """The best bandwidth of the probe in any round, and how much of it the machine gave in the rounds of each case."""
    best = {measured.config: measured.bytes / (measured.timed[FLOOR].best() or math.inf) / 1e6 for measured in results}
    top = max(results, key=lambda measured: best[measured.config])
    shares = []
    for measured in results:
        timed = measured.timed[FLOOR]
        shares.append((timed.best() or math.nan) / (timed.median() or math.nan))
    return (
        f"Bandwidth: the probe's best round moved {number(best[top.config])} GB/s ({top.config}). In its median round "
        f"the probe reached {min(shares):.0%} to {max(shares):.0%} of its best round of the case; the rest went to "
        "other users of the machine."
    )


def reasons(results: list[Measured], impossible: dict[str, str]) -> str:
    """Which peers were left out of which cases, and why: one line per peer and reason."""
    cases: dict[tuple[str, str], list[str]] = {}
    for measured in results:
        for name, reason in measured.skipped.items():
            cases.setdefault((name, reason), []).append(str(measured.config))
    lines = [
        f"- {name}: {reason}" + ("" if len(where) == len(results) else f" ({'; '.join(where)})")
        for (name, reason), where in cases.items()
    ]
    lines += [f"- {case}: {reason}" for case, reason in impossible.items()]
    return "\n".join(lines)


def goals_table(goals: dict[Config, Goal], results: list[Measured]) -> str:
    others = {measured.config: measured for measured in results}
    rows = [
        [str(measured.config), peer, goal, figure, "met" if met else "missed"]
        for measured in results
        for peer, goal, figure, met in verdicts(goals.get(measured.config, Goal()), measured, others)
    ]
    return markdown(["case", "peer", "goal", "figure", "verdict"], rows) if rows else ""


def document(
    title: str,
    about: dict[str, Any],
    results: list[Measured],
    impossible: dict[str, str],
    goals: dict[Config, Goal],
    picture: str,
) -> str:
    gpu = about["cuda"] is not None and results[0].timed[FLOOR].host_us is not None
    versions = [f"{key} {about[key]}" for key in ("python", "torch", "triton", "cuda", "driver") if about[key]]
    kernel = f", {about['instruction_set']}" if about["instruction_set"] else ""
    floors = "; ".join(sorted({measured.floor for measured in results}))
    rounds = len(results[0].timed[FLOOR].samples["ms"])
    parts = [
        f"# {title}",
        f"`{about['command']}`",
        f"{about['device']}{kernel}, {about['threads']} threads; {', '.join(versions)}; commit {about['commit']}; "
        f"{about['date']}; {rounds} rounds; load average at most {max(m.load for m in results):.1f}.",
        bandwidth(results),
        METHOD.format(baseline=column_name(results), floor=floors, host=GPU_HOST if gpu else CPU_HOST),
        *filter(None, [BASELINE if column_name(results) == "baseline" else "", notes(results)]),
        f"![Speed of each peer against {column_name(results)}]({picture})",
        table(results, gpu),
    ]
    if text := goals_table(goals, results):
        parts += ["## Goals", text]
    if text := reasons(results, impossible):
        parts += ["## Left out", text]
    return "\n\n".join(parts) + "\n"


def write_json(path: Path, about: dict[str, Any], results: list[Measured], impossible: dict[str, str]) -> None:
    content = {"about": about, "results": [measured.json() for measured in results], "impossible": impossible}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes the file in one step: a program that is killed meanwhile leaves the old file intact."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)
