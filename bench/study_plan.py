"""The plan of the study: settings of the tasks, the search for each optimizer's lr and decay, and the final runs.

A chain is a generator that yields runs and receives their outcomes. Chains are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import study_data
from study_optimizers import CONTENDERS, Contender
from study_records import Outcome, Run
from study_tasks import LAYERWISE, ONE_LR

Chain = Generator[Run, Outcome, None]
Search = Generator[Run, Outcome, tuple[float, float]]

TASKS = ("images", "awd-lstm", "qrnn", "finetune", "schedules")
SEARCH_SEED = 1000  # differs from the seeds of the final runs
LR_FACTOR, DECAY_FACTOR = 10**0.5, 10.0
CYCLED = ("AdamW", "SGDW")  # the optimizers of the schedules' task
SCHEDULES = ("1cycle", "step", "constant")


@dataclass(frozen=True)
class Size:
    """The amount of work. lr_trials, decay_trials: runs of one search. lengths: epochs in the schedules' task."""

    lr_trials: int = 5
    decay_trials: int = 3
    lengths: tuple[int, ...] = (2, 4, 8, 16)


QUICK = Size(lr_trials=2, decay_trials=1, lengths=(1, 2))


def ladder(scores: dict[float, float]) -> float:
    """The rung to try next. scores: by rung tried so far; less is better.

    The first rung is 0. While the best rung is at an end, the next one lies beyond that end. Otherwise it lies half-way
    between the best rung and its better neighbour.
    """
    if not scores:
        return 0.0
    rungs = sorted(scores)
    best = min(rungs, key=lambda rung: scores[rung])
    place = rungs.index(best)
    if len(rungs) == 1:
        return best + 1 if math.isfinite(scores[best]) else best - 1
    if place == 0:
        return best - 1
    if place == len(rungs) - 1:
        return best + 1
    neighbour = min(rungs[place - 1], rungs[place + 1], key=lambda rung: scores[rung])
    return (best + neighbour) / 2


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def score(outcome: Outcome) -> float:
    return math.inf if outcome["score"] is None else outcome["score"]


def search(make: Callable[[float, float], Run], start_lr: float, start_decay: float, size: Size) -> Search:
    """Searches for the lr at the start decay, then for the decay at the best lr. Returns the best pair. Every optimizer
    gets the same number of runs."""
    lrs: dict[float, float] = {}
    while len(lrs) < size.lr_trials:
        rung = ladder(lrs)
        outcome = yield make(rounded(start_lr * LR_FACTOR**rung), start_decay)
        lrs[rung] = score(outcome)
    best = min(sorted(lrs), key=lambda rung: lrs[rung])
    best_lr = rounded(start_lr * LR_FACTOR**best)
    decays = {0.0: lrs[best]}
    while len(decays) <= size.decay_trials:
        rung = ladder(decays)
        outcome = yield make(best_lr, rounded(start_decay * DECAY_FACTOR**rung))
        decays[rung] = score(outcome)
    best = min(sorted(decays), key=lambda rung: decays[rung])
    return best_lr, rounded(start_decay * DECAY_FACTOR**best)


Task = dict[str, str | int | float | bool]


def tasks(folder: Path | None, quick: bool) -> dict[str, Task]:
    """The settings of all tasks. The data are CIFAR-10 or WikiText-2 if the folder holds them, else the data that come
    with Python and scikit-learn."""
    images: Task = {"data": "scikit-learn's digits", "depth": 10, "k": 1, "batch": 32, "reach": 1, "mirror": False}
    images |= {"epochs": 14, "restart": 2, "pretraining": 6, "per class": 10, "small batch": 10}
    images["images"] = 96 if quick else 1000  # at most, of each part
    if cifar := study_data.find(folder, "data_batch_1"):
        images |= {"data": "CIFAR-10", "depth": 22, "k": 6, "batch": 128, "reach": 4, "mirror": True}
        del images["images"]
        images |= {"epochs": 30, "pretraining": 15, "per class": 100, "small batch": 32}
        sample = study_data.cifar10(cifar)
    else:
        sample = study_data.digits(int(images["images"]))
    if quick:
        images |= {"epochs": 2, "restart": 1, "pretraining": 1}
    images["checksum"] = study_data.checksum(*sample.train, *sample.test)

    language: Task = {"data": "pydoc_data.topics", "size": 64, "layers": 2, "batch": 16, "bptt": 32}
    language |= {"epochs": 3, "restart": 1, "window": 500, "alpha": 2.0, "beta": 1.0}
    if wikitext := study_data.find(folder, "wiki.train.tokens"):
        language |= {"data": "WikiText-2", "size": 400, "layers": 3, "batch": 40, "bptt": 70, "window": 2000}
        language["epochs"] = 63
        text = study_data.wikitext2(wikitext)
    else:
        language |= {"vocabulary": 1000, "words": 1_000_000}
        if quick:
            language |= {"size": 16, "layers": 1, "vocabulary": 100, "words": 2000, "epochs": 1}
        text = study_data.python_topics(int(language["vocabulary"]), int(language["words"]))
    language["checksum"] = study_data.checksum(text.train, text.test)

    own = ("pretraining", "per class", "small batch")
    plain = {name: value for name, value in images.items() if name not in own}
    return {
        "images": {"name": "images"} | plain,
        "awd-lstm": {"name": "awd-lstm"} | language,
        "qrnn": {"name": "qrnn"} | language,
        "finetune": {"name": "finetune"} | images | {"batch": images["small batch"]},
        "schedules": {"name": "schedules"} | plain,
    }


def contest(task: Task, contender: Contender, variant: str, seeds: range, size: Size) -> Chain:
    """Searches for lr and decay, then trains with them, once for each seed."""
    settings, epochs = tuple(task.items()), int(task["epochs"])
    kind = {"images": "images", "finetune": "finetune"}.get(str(task["name"]), "language")

    def make(lr: float, decay: float, seed: int = SEARCH_SEED, split: str = "valid") -> Run:
        return Run(settings, contender.name, lr, decay, epochs, contender.schedule, seed, split, variant)

    lr, decay = yield from search(make, contender.lr[kind], contender.decay, size)
    for seed in seeds:
        yield make(lr, decay, seed, "test")


def race(task: Task, contender: Contender, schedule: str, seeds: range, size: Size) -> Chain:
    """The schedules' task: searches for the lr at one length, then trains at every length with it. The constant
    schedule runs only at the longest length, because its shorter runs are the beginning of that one."""
    settings = tuple((name, value) for name, value in task.items() if name != "epochs")
    middle = size.lengths[len(size.lengths) // 2]

    def make(lr: float, decay: float) -> Run:
        return Run(settings, contender.name, lr, decay, middle, schedule, SEARCH_SEED, "valid")

    lr, decay = yield from search(make, contender.lr["images"], contender.decay, Size(size.lr_trials, 0))
    for epochs in size.lengths[-1:] if schedule == "constant" else size.lengths:
        for seed in seeds:
            yield Run(settings, contender.name, lr, decay, epochs, schedule, seed, "test")


def chains(names: list[str], optimizers: list[str], seeds: range, folder: Path | None, quick: bool) -> list[Chain]:
    settings, size = tasks(folder, quick), QUICK if quick else Size()
    plan: list[Chain] = []
    for name in names:
        contenders = [CONTENDERS[optimizer] for optimizer in optimizers]
        if name == "schedules":
            cycled = [contender for contender in contenders if contender.name in CYCLED]
            plan += [race(settings[name], contender, each, seeds, size) for contender in cycled for each in SCHEDULES]
        else:
            variants = (ONE_LR, LAYERWISE) if name == "finetune" else ("",)
            plan += [
                contest(settings[name], contender, variant, seeds, size)
                for contender in contenders
                for variant in variants
            ]
    return plan


def count(names: list[str], optimizers: list[str], seeds: range, quick: bool) -> int:
    """The number of runs in the plan. It is known beforehand, because every search has a fixed number of runs."""
    size = QUICK if quick else Size()
    contest_runs = size.lr_trials + size.decay_trials + len(seeds)
    total = 0
    for name in names:
        if name == "schedules":
            lengths = sum(1 if schedule == "constant" else len(size.lengths) for schedule in SCHEDULES)
            runs = len(SCHEDULES) * size.lr_trials + lengths * len(seeds)
            total += runs * sum(optimizer in CYCLED for optimizer in optimizers)
        else:
            total += contest_runs * len(optimizers) * (2 if name == "finetune" else 1)
    return total
