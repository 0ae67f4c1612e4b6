"""The study's page: tables, plots, and what they allow to say."""

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
A wide ResNet (pre-activation) of depth {depth} and width {k} on {data}, {epochs} epochs in batches of {batch}; each
train image moved by up to {reach} pixels{mirrored}. Test-time augmentation: the mean of the logits over the plain
image{mirror_view} and the image moved by {reach} pixels up, down, left and right.""",
    "language": """\
{layers} layers of {size} units on {data}, embedding and decoder tied, {epochs} epochs in batches of {batch} x {bptt}
words, AR {alpha:g} and TAR {beta:g}, gradient norm clipped to 0.25. The pointer looks back over {window} words; its
sharpness and its share fit the validation text, for each run anew.""",
    "finetune": """\
The net of the images' task learns classes 0 to 4 first ({pretraining} epochs, AdamW, the same weights for all who go on
from there), then gets a new head and {per class} images of each of the classes 5 to 9. One learning rate for all, or
layer-wise ones: each stage 2.6 times less than the one above it.""",
    "schedules": """\
The images' task at several lengths. lr was searched for at one length, for each schedule; the decay is the one that the
search for lr started from. Step: a tenth of the lr after half and after three quarters. The target is the error at
which the constant schedule ends (mean over seeds); what counts is the first epoch at which one of a schedule's runs, of
whatever length, is there, and one epoch more than the longest run where none is.""",
}

COST = """\
Medians of the final runs, in milliseconds. At every fourth step torch's own class (Adam or AdamW, on copies of the
params, with the same gradients) stepped beside ours, taking turns in going first: "torch" in its default
implementation, which is {default}; "torch fused" with fused=True. torch has no SGDW, QHAdamW or LAMB; AdamWR is held
against torch's AdamW. Shares are of a whole training step: forward, backward, clipping, optimizer and scheduler. With
more than one job, other runs of the study worked on the other CPUs meanwhile."""

INTRODUCTION = """\
Written by `{command}` from {count:,} runs, which took {minutes:.1f} minutes of one worker each in all, made with:

{made}

Each optimizer has its own lr and decay, from a search with the same number of runs for each, on a validation split and
with a seed of its own; the final runs train on the same data with other seeds and are scored on the test split, which
nothing else has seen. Adam, AdamW, SGDW, QHAdamW and LAMB follow 1cycle, AdamWR its warm restarts. Numbers are mean ±
standard deviation over seeds."""


def findings(made: list[Claim]) -> list[str]:
    """A heading, a sentence and a table for each."""
    parts = []
    header = ["task", "comparison", "measure", "less by (95 % interval)", "spread over seeds", "what shows"]
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
            markdown(["optimizer", "target error, %", "schedule", "epochs, median", "seeds that got there"], rows)
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
    """All trials: lr / decay: validation score."""
    trials: dict[tuple[str, ...], list[str]] = {}
    for run, outcome in results.of(name, "valid"):
        who = (run.optimizer, run.variant or run.schedule)
        shown = "diverged" if outcome["score"] is None else f"{outcome['score']:.3f}"
        trials.setdefault(who, []).append(f"{run.lr:g} / {run.decay:g}: {shown}")
    return markdown(
        ["optimizer", "with", "lr / decay: score"], [[*who, "; ".join(told)] for who, told in trials.items()]
    )


def costs(results: Results) -> dict[tuple[str, str], dict[str, float]]:
    """By task and optimizer: medians over the final runs, in milliseconds, of the whole training step and of each
    optimizer's step."""
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
    log = f"<details><summary>The search: {what} of the validation split, in the order of the trials</summary>"
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
        *(["**A quick run: far too short to mean anything.**"] if quick else []),
        INTRODUCTION.format(
            command=shlex.join(["python", *sys.argv]), count=len(done), minutes=seconds / 60, made=about
        ),
    ]
    parts.append("## What shows")
    if found:
        parts += [RULE.format(count=len(found), expected=len(found) / 20), *findings(found)]
    else:
        parts.append(f"Nothing can be said: no comparison has the {FEWEST} seeds that one needs.")
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
