"""Tests the findings of the article on the study's runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from study_plan import CYCLED, SCHEDULES
from study_records import Outcome, Run
from study_statistics import FEWEST, NOTHING, Difference, difference
from study_tasks import LAYERWISE, ONE_LR

Done = list[tuple[Run, Outcome]]

METRICS = {
    "images": ("error", "error with tta"),
    "awd-lstm": ("perplexity", "perplexity with pointer"),
    "qrnn": ("perplexity", "perplexity with pointer"),
    "finetune": ("error", "error with tta"),
}


class Results:
    """The runs that are done, selected by task and split."""

    def __init__(self, done: Done) -> None:
        self.done = done

    def of(self, name: str, split: str) -> Done:
        return [(run, outcome) for run, outcome in self.done if run.settings["name"] == name and run.split == split]

    def settings(self, name: str) -> dict[str, Any] | None:
        return next((run.settings for run, _ in self.done if run.settings["name"] == name), None)

    def contestants(self, name: str) -> list[tuple[str, str]]:
        """(optimizer, variant) of the final runs, each once."""
        return list(dict.fromkeys((run.optimizer, run.variant) for run, _ in self.of(name, "test")))

    def values(self, name: str, optimizer: str, metric: str, variant: str = "") -> dict[int, float]:
        """The metric of the final runs, by seed. Runs that diverged have no value."""
        return {
            run.seed: outcome[metric]
            for run, outcome in self.of(name, "test")
            if (run.optimizer, run.variant) == (optimizer, variant) and metric in outcome
        }


# ---- epochs to target


def epochs_to_target(results: Results) -> dict[str, tuple[float, dict[str, dict[int, float]]]]:
    """By optimizer: the target error, and by schedule and seed the first epoch at which a run reached it.

    The target is the final error of the constant schedule, averaged over seeds. Runs of all lengths count, at every
    epoch. If no run with this schedule and seed reaches the target, the value is one epoch more than the longest run.
    """
    made: dict[str, tuple[float, dict[str, dict[int, float]]]] = {}
    runs = [(run, outcome) for run, outcome in results.of("schedules", "test") if "curve" in outcome]
    for optimizer in CYCLED:
        mine = [(run, outcome) for run, outcome in runs if run.optimizer == optimizer]
        ends = [outcome["curve"][-1] for run, outcome in mine if run.schedule == "constant"]
        if not ends:
            continue
        target, never = fmean(ends), 1.0 + max(run.epochs for run, _ in mine)
        reached: dict[str, dict[int, float]] = {schedule: {} for schedule in SCHEDULES}
        for run, outcome in mine:
            first = next((float(epoch) for epoch, error in enumerate(outcome["curve"], 1) if error <= target), never)
            by_seed = reached[run.schedule]
            by_seed[run.seed] = min(by_seed.get(run.seed, never), first)
        made[optimizer] = target, reached
    return made


# ---- findings


@dataclass(frozen=True)
class Claim:
    """The claim that the first is better than the second. expected: the article's finding, None if it has none."""

    finding: str
    text: str
    task: str
    metric: str
    found: Difference
    expected: bool | None

    @property
    def words(self) -> str:
        verdict = self.found.verdict
        if self.expected is None:
            return verdict
        better = verdict in ("better", "slightly better")
        if better == self.expected:
            return f"{verdict}: as in the article"
        return verdict if verdict == NOTHING else f"{verdict}: against the article"


DECOUPLED = "Decoupled decay (AdamW) against L2 (Adam), each tuned"
AMSGRAD = "amsgrad on against off"
OTHERS = "SGDW, AdamWR, QHAdamW and LAMB against AdamW"
HELPED = {"images": "Test-time augmentation", "awd-lstm": "The cache pointer", "qrnn": "The cache pointer"}
LAYERS = "Layer-wise learning rates against one"
CYCLE = "1cycle against the other schedules, in epochs to the target"

PAIRS = (
    (DECOUPLED, "AdamW", "Adam", True),
    (DECOUPLED, "AdamW amsgrad", "Adam amsgrad", True),
    (AMSGRAD, "Adam amsgrad", "Adam", False),
    (AMSGRAD, "AdamW amsgrad", "AdamW", False),
    *((OTHERS, other, "AdamW", None) for other in ("SGDW", "AdamWR", "QHAdamW", "LAMB")),
)


def claims(results: Results) -> list[Claim]:
    """All comparisons with enough seeds."""
    made: list[Claim] = []

    def compare(
        finding: str,
        text: str,
        task: str,
        metric: str,
        first: dict[int, float],
        second: dict[int, float],
        expected: bool | None,
    ) -> None:
        if len(first.keys() & second.keys()) >= FEWEST:
            made.append(Claim(finding, text, task, metric, difference(first, second), expected))

    for task, (plain, helped) in METRICS.items():
        variant = ONE_LR if task == "finetune" else ""
        for finding, first, second, expected in PAIRS:
            values = [results.values(task, each, plain, variant) for each in (first, second)]
            compare(finding, f"{first} against {second}", task, plain, values[0], values[1], expected)
        for optimizer, each in results.contestants(task):
            if task != "finetune":
                values = [results.values(task, optimizer, metric) for metric in (helped, plain)]
                compare(HELPED[task], f"{optimizer}, {helped}", task, plain, values[0], values[1], True)
            elif each == LAYERWISE:
                values = [results.values(task, optimizer, plain, each) for each in (LAYERWISE, ONE_LR)]
                text = f"{optimizer}, {LAYERWISE} against {ONE_LR}"
                compare(LAYERS, text, task, plain, values[0], values[1], True)
    for optimizer, (_, reached) in epochs_to_target(results).items():
        for other in ("step", "constant"):
            text = f"{optimizer}, 1cycle against {other}"
            compare(CYCLE, text, "schedules", "epochs to target", reached["1cycle"], reached[other], True)
    return made


def sentence(made: list[Claim]) -> str:
    """How many of these comparisons have which verdict, as a sentence."""
    counts = Counter(claim.found.verdict for claim in made)
    told = ", ".join(f"{verdict} in {count}" for verdict, count in counts.most_common())
    return f"Of {counts.total()} comparisons: {told}."
