"""Which optimizer trains best here? The study behind fast.ai's article on AdamW and super-convergence, in small.

Adam with L2 and AdamW, each without and with amsgrad, SGDW, AdamWR, QHAdamW and LAMB train an image net from scratch,
two language models, and a net that is fine-tuned, each with its own lr and decay from a search on validation data;
1cycle is held against a step and a constant schedule. Every run is a line in runs.jsonl: a study that was stopped goes
on from there. The page study.md says what came of it.

    python bench/study.py                      about 20 minutes on two cores
    python bench/study.py --quick --out DIR    a smoke run
    python bench/study.py --data DIR           on CIFAR-10 and WikiText-2, where DIR holds data_batch_1 and so on and
                                               wiki.train.tokens and so on
    python bench/study.py --report             the page anew from the runs that are done
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
    """The chain's next run, after it has been sent the last one's outcome; None at its end."""
    try:
        return next(chain) if outcome is None else chain.send(outcome)
    except StopIteration:
        return None


def recall(chain: study_plan.Chain, run: Run | None, records: Records, done: Done) -> Run | None:
    """Goes on along the chain over the runs that are recorded, to the first one that is not."""
    while run is not None and (outcome := records.get(run)) is not None:
        done.append((run, outcome))
        run = advance(chain, outcome)
    return run


def recorded(chains: list[study_plan.Chain], records: Records) -> Done:
    """The runs of the plan that are recorded; a chain ends at its first one that is not."""
    done: Done = []
    for chain in chains:
        recall(chain, advance(chain, None), records, done)
    return done


class Here(Executor):
    """Does the work in this process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def carry_out(
    chains: list[study_plan.Chain], records: Records, place: Place, executor: Executor, jobs: int
) -> Iterator[Run]:
    """Trains and records what is not recorded yet, this many runs at once; yields each run when it is done."""
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
            # In front, so that chain after chain is finished.
            ready.appendleft((chain, recall(chain, advance(chain, outcome), records, [])))


def about(place: Place) -> dict[str, Any]:
    described = environment.describe(torch.device(place.device))
    return {key: described[key] for key in ("commit", "device", "cpu", "instruction_set", "python", "torch", "cuda")}


def start_worker(threads: int) -> None:
    """A worker ends with the study, even where that was killed and could tell it nothing."""
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
    """Reads names between commas, all of them known."""

    def read(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
        return found

    return read


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks, optimizers = list(study_plan.TASKS), list(CONTENDERS)
    parser.add_argument("--tasks", type=names(tasks), default=tasks, metavar="A,B", help=", ".join(tasks))
    parser.add_argument(
        "--optimizers", type=names(optimizers), default=optimizers, metavar="A,B", help=", ".join(optimizers)
    )
    parser.add_argument("--seeds", type=int, default=None, help="final runs of each optimizer (5, or 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="everything once, far too short to mean anything")
    parser.add_argument("--data", type=Path, help="folder with the files of CIFAR-10 or WikiText-2")
    parser.add_argument("--out", type=Path, default=environment.ROOT / "bench" / "results" / "study")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page from what is recorded")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cpus, help="runs at once (one for each CPU)")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
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
            for run in carry_out(plan(), records, place, executor, options.jobs):
                bar.set_postfix_str(str(run), refresh=False)
                bar.update()
    page = study_report.write(options.out, recorded(plan(), records), records.made, options.quick)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
