"""Times one optimizer step: ours, its peers, and a bandwidth probe of the same memory traffic, in one run.

    python bench/step.py --case gpt2-124m,resnet50 --dtype float32,bf16
    python bench/step.py --optimizer lamb --case resnet50
    python bench/step.py --case gpt2-124m --against HEAD~1   (compares with the kernels of another commit)
    python bench/step.py --suite cpu      (writes bench/results/<machine>/step-cpu.{json,md,png}; the other suites are
                                          family on the CPU, gpu and gpu-family)

Every peer's numbers are checked against float64 before it is timed. A peer that is wrong or cannot run is left out, and
the output gives the reason. Files are written after each case; --resume keeps the cases that they already hold.
Exits with 1 if one of our optimizers computes wrong numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path

import torch
from against import package_at
from environment import ROOT, describe, device_name, folder_name
from family import AMSGRAD, BASELINES, OPTIMIZERS
from measure import Measured, measure, measured_from, reason_of
from peers import PEERS, add_ours_at
from report import against_table, document, goals_table, reasons, table, write_json, write_whole
from shapes import CASES
from suites import SUITES, Goal, Suite
from workload import DTYPES, Config

GROUPS = ("one", "two", "each")
MIN_ROUNDS = 10


def listed(known: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names; unknown names are an error."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, but got {', '.join(unknown)}")
        return names

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="a fixed grid; sets device, optimizers, cases, peers and files")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--case", type=listed(CASES), default=["gpt2-124m"], help=", ".join(CASES))
    parser.add_argument("--dtype", type=listed(DTYPES), default=["float32"], help=", ".join(DTYPES))
    parser.add_argument(
        "--groups", type=listed(GROUPS), default=["one"], help="one, two (decay and no decay), each (one per tensor)"
    )
    parser.add_argument("--peers", type=listed(PEERS), help=", ".join(PEERS))
    usual = " or ".join(BASELINES)
    parser.add_argument(
        "--baseline",
        choices=PEERS,
        help=f"the peer that ratios are against (default: {usual}, the first that works)",
    )
    parser.add_argument("--against", metavar="COMMIT", help="also build that commit, and compare ours with it")
    parser.add_argument("--crowded", action="store_true", help="run a busy process for each core but one meanwhile")
    parser.add_argument("--amsgrad", action="store_true")
    parser.set_defaults(hot=False)
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument(
        "--cold", dest="hot", action="store_false", default=False, help="flush the caches before each step (default)"
    )
    heat.add_argument("--hot", dest="hot", action="store_true", help="step twice and time the second")
    parser.add_argument("--rounds", type=int, help=f"at least {MIN_ROUNDS} (default: {Suite.rounds})")
    parser.add_argument("--graph", action="store_true", help="also time the replay of a captured CUDA graph")
    parser.add_argument("--threads", type=int, help="number of torch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="skip the cases that the JSON file already holds")
    parser.add_argument("--out", type=Path, help="folder for a suite's files (default: bench/results/<machine>)")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}, or medians are too noisy, but got {options.rounds}")
    if options.amsgrad and options.optimizer not in AMSGRAD:
        parser.error(f"--amsgrad requires --optimizer {' or '.join(AMSGRAD)}, but got {options.optimizer}")
    return options


def chosen(options: argparse.Namespace) -> Suite:
    if options.suite:
        return SUITES[options.suite]
    grid = product(options.case, options.dtype, options.groups)
    goals = {
        Config(case, dtype, groups, options.amsgrad, options.hot, options.optimizer, options.crowded): Goal()
        for case, dtype, groups in grid
    }
    return Suite(options.device, SUITES["gpu" if options.device == "cuda" else "cpu"].peers, goals, graph=options.graph)


def main() -> int:
    options = arguments()
    if options.against is None:
        return compare(options, None)
    with package_at(options.against) as package:
        return compare(options, add_ours_at(package))


def compare(options: argparse.Namespace, other: str | None) -> int:
    """Runs all cases. other: the name of the peer that is another commit of ours."""
    suite = chosen(options)
    if suite.device == "cuda" and not torch.cuda.is_available():
        print("Nothing was measured: torch finds no GPU on this machine.", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(suite.device)
    if device.type == "cpu" and (load := os.getloadavg()[0]) > 0.5:
        # A parallel region waits for its last thread. A thread that loses its core delays it by a whole time slice.
        print(f"Load average {load:.1f}: other busy processes will distort the figures.", file=sys.stderr)

    results, impossible = earlier(options, suite, device) if options.resume else ([], {})
    finished = {str(measured.config) for measured in results} | impossible.keys()
    for config in (config for config in suite.configs if str(config) not in finished):
        peers = suite.peers_of(config, options.peers, options.baseline) + ([other] if other else [])
        try:
            measured = measure(config, device, peers, options.baseline, options.rounds or suite.rounds, suite.graph)
        except Exception as error:  # the other cases still run
            measured = reason_of(error)
        if isinstance(measured, str):
            impossible[str(config)] = measured
        else:
            results.append(measured)
            print("\n" + table([measured], device.type == "cuda"), flush=True)
        write(options, suite, results, impossible, device)
    if other and (text := against_table(results, other)):
        print("\n" + text)
    if text := reasons(results, impossible):
        print("\nLeft out:\n" + text)
    if not results:
        return 1
    finish(options, suite, results, device)
    wrong = [
        name
        for measured in results
        for name, reason in measured.skipped.items()
        if name.startswith("ours") and "Arithmetic" in reason
    ]
    return 1 if wrong else 0


def files(options: argparse.Namespace, device: torch.device) -> tuple[Path | None, Path | None, Path | None]:
    """The paths for JSON, Markdown and picture, each None if it is not written. A suite writes all three."""
    if not options.suite:
        return options.json, None, options.plot
    folder = options.out or ROOT / "bench" / "results" / folder_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    json_file, text_file, plot_file = (folder / f"step-{options.suite}.{kind}" for kind in ("json", "md", "png"))
    return json_file, text_file, plot_file


def earlier(options: argparse.Namespace, suite: Suite, device: torch.device) -> tuple[list[Measured], dict[str, str]]:
    """This suite's figures that the JSON file already holds."""
    path = files(options, device)[0]
    if path is None or not path.exists():
        return [], {}
    content = json.loads(path.read_text())
    results = [measured_from(one) for one in content["results"]]
    wanted = set(map(str, suite.configs))
    impossible = {name: reason for name, reason in content["impossible"].items() if name in wanted}
    return [measured for measured in results if str(measured.config) in wanted], impossible


def title_of(suite: Suite, device: torch.device) -> str:
    return f"Step of {suite.title} {device_name(device)}"


def write(
    options: argparse.Namespace, suite: Suite, results: list[Measured], impossible: dict[str, str], device: torch.device
) -> None:
    about = describe(device)
    json_file, text_file, plot_file = files(options, device)
    if text_file and plot_file and results:
        title = title_of(suite, device)
        write_whole(text_file, document(title, about, results, impossible, suite.goals, plot_file.name))
    if json_file:
        write_json(json_file, about, results, impossible)


def finish(options: argparse.Namespace, suite: Suite, results: list[Measured], device: torch.device) -> None:
    """Prints the goals and draws the plot. Both need all cases."""
    _, text_file, plot_file = files(options, device)
    if text_file:
        print(f"\n{goals_table(suite.goals, results)}\n\nWrote {text_file}, .json and .png")
    if plot_file:
        try:
            from plot import draw
        except ImportError as error:
            print(f"No plot: {error}", file=sys.stderr)
            return
        draw(plot_file, results, title_of(suite, device))


if __name__ == "__main__":
    sys.exit(main())
