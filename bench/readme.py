"""Writes the tables of figures in README.md, docs/benchmarks.md and docs/choose.md from the committed results.

python bench/readme.py           # writes each table between its marks
python bench/readme.py --check   # exits with 1 and names the page if a table differs from the JSON
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EPYC, XEON = "amd-epyc-2-cpus", "intel-r-xeon-r-processor-2-cpus"

STEPS: dict[str, dict[str, Any]] = {
    "one tensor of 100 million, float32": {"case": "one-tensor-100m"},
    "GPT-2 124M, 148 tensors, float32": {"case": "gpt2-124m", "groups": "one", "amsgrad": False},
    "GPT-2 124M, all bfloat16": {"case": "gpt2-124m", "dtype": "bf16"},
    "GPT-2 124M, bfloat16 with float32 states": {"case": "gpt2-124m", "dtype": "bf16-float32-states"},
    "ResNet-50, 161 tensors, float32": {"case": "resnet50", "crowded": False},
    "the same, with a busy process for each core but one": {"case": "resnet50", "crowded": True},
    "2,000 tensors of 1,000, float32": {"case": "2000x1000", "hot": False},
    "the same, in cache": {"case": "2000x1000", "hot": True},
    "600 tensors of 1,000, in cache": {"case": "600x1000", "crowded": False},
    "the same, with a busy process for each core but one, mean": {"case": "600x1000", "crowded": True},
    "10,000 tensors of 64, float32": {"case": "10000x64"},
    "465 tensors of 1,000": {"case": "465x1000"},
    "the same, one group per tensor": {"case": "465-groups"},
}
FAMILY = {"SGD, momentum": "sgd", "SGDW": "sgdw", "QHAdamW": "qhadamw", "LAMB, no clipping": "lamb", "Lion": "lion"}
FAMILY_CASES = {"GPT-2 124M": "gpt2-124m", "ResNet-50": "resnet50", "2,000 tensors of 1,000": "2000x1000"}


def results(machine: str, suite: str) -> list[dict[str, Any]]:
    path = ROOT / "bench" / "results" / machine / f"step-{suite}.json"
    return list(json.loads(path.read_text())["results"])


def find(measured: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the case with these options, or None. An option that an older file lacks counts as off."""
    defaults = {"dtype": "float32", "crowded": False, **wanted}
    for result in measured:
        if all(result["config"].get(key, False) == value for key, value in defaults.items()):
            return result
    return None


def peer(result: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((timed for timed in result["peers"] if timed["name"] == name), None)


def milliseconds(timed: dict[str, Any] | None, key: str = "median_ms") -> str:
    return "none" if timed is None else f"{timed[key]:.3g} ms"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 5 else f"{value:.2g}"


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steps(machine: str) -> str:
    measured = results(machine, "cpu")
    rows = []
    for label, wanted in STEPS.items():
        result = find(measured, wanted)
        ours = peer(result, "ours") if result else None
        if result is None or ours is None:
            continue
        key = "mean_ms" if label.endswith("mean") else "median_ms"
        fused = peer(result, "torch-fused")
        ratio = fused[key] / ours[key] if fused and key == "mean_ms" else ours.get("speed_against_torch-fused")
        rows.append(
            [label, milliseconds(ours, key), milliseconds(fused, key), times(ratio), times(ours["share_of_floor"])]
        )
    return markdown(["AdamW step", "fused_optim", "torch fused", "speed-up", "share of the floor's speed"], rows)


def family(machine: str) -> str:
    measured = results(machine, "family")
    rows = []
    for label, optimizer in FAMILY.items():
        for model, case in FAMILY_CASES.items():
            result = find(measured, {"optimizer": optimizer, "case": case})
            ours = peer(result, "ours") if result else None
            if result is None or ours is None:
                continue
            baseline = result["baseline"]
            other = peer(result, baseline)
            ratio = times(ours.get(f"speed_against_{baseline}")) if other else ""
            against = baseline.replace("torch-", "torch ") if other else "none"
            rows.append([label, model, milliseconds(ours), against, ratio, times(ours["share_of_floor"])])
    header = ["step, float32", "model", "fused_optim", "peer", "speed-up", "share of the floor's speed"]
    return markdown(header, rows, left=2)


def memory() -> str:
    """Bytes per element of a large float32 param, by the library's own cost model."""
    import torch

    from fused_optim.cost.step_cost import OPTIMIZERS, cost_of, prepare

    rows = []
    for name, cls in OPTIMIZERS.items():
        options: dict[str, Any] = {"momentum": 0.9} if name in ("sgd", "sgdw") else {}
        cost = cost_of(prepare({"param": torch.empty(1 << 20, device="meta")}, name, **options))
        states, moved = (round(value / cost.elements) for value in (cost.states, cost.moved))
        rows.append([f"`{cls.__name__}`", str(states), str(moved), str(cost.loops)])  # type: ignore[attr-defined]
    rows.sort(key=lambda row: (int(row[1]), int(row[2]), row[0]))
    return markdown(["class", "bytes of states", "bytes moved by a step", "passes"], rows)


def study() -> str:
    import study_family_report
    from study_claims import Results

    done = study_family_report.read(ROOT / "bench" / "results" / "study_family" / "runs.jsonl")
    return study_family_report.summary(Results(done))


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"step-cpu": partial(steps, XEON)},
    "docs/benchmarks.md": {"step-cpu-epyc": partial(steps, EPYC), "step-family": partial(family, EPYC)},
    "docs/choose.md": {"memory": memory, "study": study},
}


def filled(page: str, text: str) -> str:
    """The page's text with every table replaced by the one from the JSON.

    Raises:
        ValueError: the page lacks a table's marks.
    """
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}: by bench/readme.py -->\n", "<!-- end -->\n"
        before, *after = text.split(begin)
        if len(after) != 1 or end not in after[0]:
            raise ValueError(f"{page} must hold {begin!r} once, followed by {end!r}, but does not; add the marks")
        text = before + begin + make() + "\n" + end + after[0].partition(end)[2]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        wanted = filled(page, text)
        if wanted != text:
            stale.append(page)
        if not options.check:
            (ROOT / page).write_text(wanted)
    if options.check and stale:
        pages = ", ".join(stale)
        print(f"tables in {pages} differ from the committed JSON; run python bench/readme.py", file=sys.stderr)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
