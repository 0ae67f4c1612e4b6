"""Compares how well optimizers train: a small version of the study in fast.ai's article on AdamW and super-convergence.

The optimizers are Adam with L2 and AdamW, each without and with amsgrad, SGDW, AdamWR, QHAdamW and LAMB. They train an
image net from scratch, two language models, and a net that is fine-tuned. Each optimizer gets its own lr and decay from
a search on validation data. A further task compares 1cycle with a step and a constant schedule. Every run is a line in
runs.jsonl, and a study that was stopped continues from there. The results are in study.md.

    python bench/study.py                      about 20 minutes on two cores
    python bench/study.py --quick --out DIR    a smoke run
    python bench/study.py --data DIR           on CIFAR-10 and WikiText-2, if DIR holds their files (data_batch_1, ...;
                                               wiki.train.tokens, ...)
    python bench/study.py --report             writes the page again from the recorded runs
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import environment
import study_plan
import study_report
import torch
from study_optimizers import CONTENDERS
from study_records import Outcome, Records, Run
from study_tasks import Place, train
from tqdm import tqdm

Done = list[tuple[Run, Outcome]]


def advance(chain: study_plan.Chain, outcome: Outcome | None) -> Run | None:
    """Sends the chain the outcome of its last run (None at the start). Returns its next run, or None at its end."""
    try:
        return next(chain) if outcome is None else chain.send(outcome)
    except StopIteration:
        return None


def recall(chain: study_plan.Chain, run: Run | None, records: Records, done: Done) -> Run | None:
    """Moves the chain past its recorded runs, and adds them to `done`. Returns the first run that is not recorded."""
    while run is not None and (outcome := records.get(run)) is not None:
        done.append((run, outcome))
        run = advance(chain, outcome)
    return run


def recorded(chains: list[study_plan.Chain], records: Records) -> Done:
    """The recorded runs of the plan. Each chain stops at its first run that is not recorded."""
    done: Done = []
    for chain in chains:
        recall(chain, advance(chain, None), records, done)
    return done


class Here(Executor):
    """Executes the work in this process, inside `submit`."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def carry_out(
    chains: list[study_plan.Chain],
    records: Records,
    place: Place,
    executor: Executor,
    jobs: int,
    train: Callable[[Run, Place], Outcome],
) -> Iterator[Run]:
    """Trains and records the runs that are not recorded yet, `jobs` at once. Yields each run when it is done."""
    made = about(place)
    waiting: dict[Future[Outcome], tuple[study_plan.Chain, Run]] = {}
    ready = deque((chain, recall(chain, advance(chain, None), records, [])) for chain in chains)
    while ready or waiting:
        while ready and len(waiting) < jobs:
            chain, run = ready.popleft()
            if run is not None:
                waiting[executor.submit(train, run, place)] = chain, run
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            chain, run = waiting.pop(future)
            outcome = future.result()
            records.add(run, outcome, made)
            yield run
            # In front: one chain is finished before the next one starts.
            ready.appendleft((chain, recall(chain, advance(chain, outcome), records, [])))


def about(place: Place) -> dict[str, Any]:
    described = environment.describe(torch.device(place.device))
    return {key: described[key] for key in ("commit", "device", "cpu", "instruction_set", "python", "torch", "cuda")}


def start_worker(threads: int) -> None:
    """Initialises a worker. The worker ends together with the study, even if the study is killed."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def workers(jobs: int, threads: int) -> Executor:
    if jobs == 1:
        torch.set_num_threads(threads)
        return Here()
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, initializer=start_worker, initargs=(threads,))


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names; unknown names are an error."""

    def read(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, but got {', '.join(unknown)}")
        return found

    return read


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks, optimizers = list(study_plan.TASKS), list(CONTENDERS)
    parser.add_argument("--tasks", type=names(tasks), default=tasks, metavar="A,B", help=", ".join(tasks))
    parser.add_argument(
        "--optimizers", type=names(optimizers), default=optimizers, metavar="A,B", help=", ".join(optimizers)
    )
    parser.add_argument("--seeds", type=int, help="final runs of each optimizer (default: 5, or 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="runs everything, far too briefly for meaningful results")
    parser.add_argument("--data", type=Path, help="folder with the files of CIFAR-10 or WikiText-2")
    parser.add_argument("--out", type=Path, default=environment.ROOT / "bench" / "results" / "study")
    parser.add_argument("--report", action="store_true", help="train nothing; write the page from the recorded runs")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cpus, help="runs at once (default: one for each CPU)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.seeds is None:
        options.seeds = 2 if options.quick else 5
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    records = Records(options.out / "runs.jsonl")
    place = Place(options.data, options.device, show=options.jobs == 1)

    def plan() -> list[study_plan.Chain]:
        return study_plan.chains(options.tasks, options.optimizers, range(options.seeds), options.data, options.quick)

    if not options.report:
        total = study_plan.count(options.tasks, options.optimizers, range(options.seeds), options.quick)
        done = len(recorded(plan(), records))
        with (
            workers(options.jobs, options.threads) as executor,
            tqdm(total=total, initial=done, unit="run", smoothing=0.05) as bar,
        ):
            for run in carry_out(plan(), records, place, executor, options.jobs, train):
                bar.set_postfix_str(str(run), refresh=False)
                bar.update()
    page = study_report.write(options.out, recorded(plan(), records), records.made, options.quick)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
