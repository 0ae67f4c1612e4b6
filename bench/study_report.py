"""Writes the study's page: tables, plots and findings."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

import study_plots
from report import markdown, number
from study_claims import METRICS, Claim, Done, Results, claims, epochs_to_target, sentence
from study_plan import TASKS
from study_statistics import FEWEST, RULE, plus_minus

TITLES = {
    "images": "Images from scratch",
    "awd-lstm": "Language: AWD-LSTM",
    "qrnn": "Language: QRNN",
    "finetune": "Fine-tuning with differential learning rates",
    "schedules": "Super-convergence: 1cycle, step and constant",
}

ABOUT = {
    "images": """\
A wide ResNet (pre-activation) of depth {depth} and width {k} trains on {data} for {epochs} epochs in batches of
{batch}. Each train image is moved at random by up to {reach} pixels{mirrored}. Test-time augmentation averages the
logits of the plain image{mirror_view} and the image moved by {reach} pixels up, down, left and right.""",
    "language": """\
{layers} layers of {size} units train on {data} for {epochs} epochs in batches of {batch} x {bptt} words. Embedding and
decoder are tied. AR is {alpha:g}, TAR is {beta:g}, and the gradient norm is clipped to 0.25. The pointer covers the
last {window} words. Its sharpness and its share are fitted to the validation text in each run.""",
    "finetune": """\
The net of the images' task first learns classes 0 to 4 with AdamW for {pretraining} epochs, once for each seed. All
optimizers continue from these weights, with a new head and {per class} images of each of the classes 5 to 9. All layers
have one learning rate, or they have layer-wise ones: each stage has that of the stage above it divided by 2.6.""",
    "schedules": """\
The images' task at several lengths. The lr comes from a search at one length for each schedule. The decay is the start
point of that search. The step schedule divides the lr by 10 after one half and after three quarters. The target is the
final error of the constant schedule, averaged over seeds. For each schedule and seed the result is the first epoch at
which a run of any length reaches the target, or one epoch more than the longest run if none does.""",
}

COST = """\
Medians over the final runs, in milliseconds. At every fourth step torch's own class (Adam or AdamW) also steps, on
copies of the params with the same gradients; they take turns in going first. "torch" is its default implementation,
{default}. "torch fused" has fused=True. torch has no SGDW, QHAdamW or LAMB. AdamWR is compared with torch's AdamW.
Shares are of a whole training step: forward, backward, clipping, optimizer and scheduler. With more than one job, other
runs of the study were running on the other CPUs."""

INTRODUCTION = """\
Written by `{command}` from {count:,} runs, which took {minutes:.1f} minutes of worker time in total. Made with:

{made}

Each optimizer has its own lr and decay, from a search on a validation split. The search has the same number of runs for
each optimizer, and a seed that the final runs do not use. The final runs train on the same data with other seeds. They
are scored on the test split, which the search never sees. Adam, AdamW, SGDW, QHAdamW and LAMB use 1cycle; AdamWR uses
warm restarts. Numbers are mean ± standard deviation over seeds."""


def findings(made: list[Claim]) -> list[str]:
    """A heading, a sentence and a table for each finding."""
    parts = []
    header = ["task", "comparison", "measure", "less by (95 % interval)", "spread over seeds", "verdict"]
    for finding in dict.fromkeys(claim.finding for claim in made):
        mine = [claim for claim in made if claim.finding == finding]
        rows = [
            [claim.task, claim.text, claim.metric, str(claim.found), f"{claim.found.spread:.2f}", claim.words]
            for claim in mine
        ]
        parts += [f"### {finding}", sentence(mine), markdown(header, rows)]
    return parts


# ---- tables of one task


def schedules_tables(results: Results) -> str:
    runs = results.of("schedules", "test")
    lengths = sorted({run.epochs for run, _ in runs})
    rows = []
    for optimizer, schedule in dict.fromkeys((run.optimizer, run.schedule) for run, _ in runs):
        cells = []
        for epochs in lengths:
            mine = [
                (run, outcome)
                for run, outcome in runs
                if (run.optimizer, run.schedule) == (optimizer, schedule) and "curve" in outcome
            ]
            if schedule == "constant":
                errors = [outcome["curve"][epochs - 1] for _, outcome in mine]
            else:
                errors = [outcome["error"] for run, outcome in mine if run.epochs == epochs]
            cells.append(plus_minus(errors))
        lr = next(run.lr for run, _ in runs if (run.optimizer, run.schedule) == (optimizer, schedule))
        rows.append([optimizer, schedule, number(lr), *cells])
    parts = [markdown(["optimizer", "schedule", "lr", *(f"error, % after {e} epochs" for e in lengths)], rows)]

    rows = []
    for optimizer, (target, reached) in epochs_to_target(results).items():
        for schedule, by_seed in reached.items():
            if by_seed:
                never = sum(value > lengths[-1] for value in by_seed.values())
                middle = median(by_seed.values())
                shown = f"more than {lengths[-1]}" if middle > lengths[-1] else f"{middle:g}"
                rows.append([optimizer, f"{target:.2f}", schedule, shown, f"{len(by_seed) - never} of {len(by_seed)}"])
    if rows:
        parts.append(
            markdown(["optimizer", "target error, %", "schedule", "epochs, median", "seeds that reached it"], rows)
        )
    return "\n\n".join(parts)


def contest_table(results: Results, name: str) -> str:
    header = ["optimizer", "lr", "decay", "tried", *(f"{m}{', %' if 'error' in m else ''}" for m in METRICS[name])]
    header += ["seeds", "diverged"]
    if name == "finetune":
        header.insert(1, "learning rates")
    rows = []
    for optimizer, variant in results.contestants(name):
        final = [
            (run, outcome)
            for run, outcome in results.of(name, "test")
            if (run.optimizer, run.variant) == (optimizer, variant)
        ]
        tried = sum((run.optimizer, run.variant) == (optimizer, variant) for run, _ in results.of(name, "valid"))
        run = final[0][0]
        row = [optimizer, *([variant] if name == "finetune" else []), number(run.lr), number(run.decay), str(tried)]
        row += [plus_minus([outcome[metric] for _, outcome in final if metric in outcome]) for metric in METRICS[name]]
        rows.append([*row, str(len(final)), str(sum("diverged" in outcome for _, outcome in final))])
    return markdown(header, rows)


def search_table(results: Results, name: str) -> str:
    """All trials, as "lr / decay: validation score"."""
    trials: dict[tuple[str, ...], list[str]] = {}
    for run, outcome in results.of(name, "valid"):
        who = (run.optimizer, run.variant or run.schedule)
        shown = "diverged" if outcome["score"] is None else f"{outcome['score']:.3f}"
        trials.setdefault(who, []).append(f"{run.lr:g} / {run.decay:g}: {shown}")
    return markdown(
        ["optimizer", "with", "lr / decay: score"], [[*who, "; ".join(told)] for who, told in trials.items()]
    )


def costs(results: Results) -> dict[tuple[str, str], dict[str, float]]:
    """Medians over the final runs, in milliseconds, by task and optimizer: the whole training step ("whole") and the
    step of each optimizer."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run, outcome in results.done:
        if "ours" in outcome.get("cost", {}) and run.split == "test":
            times = found.setdefault((str(run.settings["name"]), run.optimizer), {})
            for name, value in outcome["cost"].items():
                times.setdefault(name, []).append(value)
    return {who: {name: median(values) for name, values in times.items()} for who, times in found.items()}


def cost_table(measured: dict[tuple[str, str], dict[str, float]]) -> str:
    header = ["task", "optimizer", "training step, ms", "ours, ms", "share", "torch, ms", "share", "x ours"]
    header += ["torch fused, ms", "share", "x ours"]
    rows = []
    for who, times in measured.items():
        rest = times["whole"] - times["ours"]
        row = [*who, f"{times['whole']:.2f}"]
        for peer in ("ours", "torch", "torch fused"):
            known = peer in times
            row += [f"{times[peer]:.3f}", f"{times[peer] / (rest + times[peer]):.1%}"] if known else ["", ""]
            if peer != "ours":
                row.append(f"{times[peer] / times['ours']:.1f}" if known else "")
        rows.append(row)
    return markdown(header, rows)


# ---- the page


def section(results: Results, name: str, out: Path) -> list[str]:
    settings = results.settings(name)
    if settings is None or not results.of(name, "test"):
        return []
    words = {
        "mirrored": " and mirrored half the time" if settings.get("mirror") else "",
        "mirror_view": ", the mirrored one" if settings.get("mirror") else "",
    }
    kind = name if name in ABOUT else "language"
    parts = [f"## {TITLES[name]}", ABOUT[kind].format(**settings, **words)]
    if name == "schedules":
        parts += [f"![Error by epoch]({study_plots.schedules(out, results)})", schedules_tables(results)]
    else:
        parts += [f"![Every seed]({study_plots.contest(out, results, name)})", contest_table(results, name)]
    what = "nats per word" if kind == "language" else "cross-entropy"
    log = f"<details><summary>The search: {what} on the validation split, in the order of the trials</summary>"
    return [*parts, log, search_table(results, name), "</details>"]


def write(out: Path, done: Done, made: list[dict[str, Any]], quick: bool) -> Path:
    """Writes study.md and its plots from the runs that are done; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    results = Results(done)
    found = claims(results)
    seconds = sum(outcome.get("seconds", 0.0) for _, outcome in done)
    about = "\n".join("- " + ", ".join(f"{key} {value}" for key, value in way.items() if value) for way in made)
    parts = [
        "# Which optimizer trains best: the study",
        *(["**A quick run: far too short for meaningful results.**"] if quick else []),
        INTRODUCTION.format(
            command=shlex.join(["python", *sys.argv]), count=len(done), minutes=seconds / 60, made=about
        ),
    ]
    parts.append("## Findings")
    if found:
        parts += [RULE.format(count=len(found), expected=len(found) / 20), *findings(found)]
    else:
        parts.append(f"There are no findings: no comparison has the required {FEWEST} seeds.")
    for name in TASKS:
        parts += section(results, name, out)
    if measured := costs(results):
        on_cpu = all("CPU" in str(way["device"]) for way in made)
        told = COST.format(default="the for-loop on a CPU" if on_cpu else "foreach on a GPU")
        picture = study_plots.cost(out, measured)
        parts += ["## What the optimizer costs", told, cost_table(measured), f"![Cost of a step]({picture})"]
    page = out / "study.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page
