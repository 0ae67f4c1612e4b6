"""README's tables of measured figures, made of the committed JSON.

python bench/readme.py           # writes them into README.md, between their marks
python bench/readme.py --check   # exits with 1, and says which, where README.md holds others
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ROOT / "bench" / "results" / "amd-epyc-2-cpus"  # the machine whose figures README shows

STEPS: dict[str, dict[str, Any]] = {
    "one tensor of 100 million, float32": {"case": "one-tensor-100m"},
    "GPT-2 124M, 148 tensors, float32": {"case": "gpt2-124m", "groups": "one", "amsgrad": False},
    "GPT-2 124M, all bfloat16": {"case": "gpt2-124m", "dtype": "bf16"},
    "GPT-2 124M, bfloat16 with float32 states": {"case": "gpt2-124m", "dtype": "bf16-float32-states"},
    "ResNet-50, 161 tensors, float32": {"case": "resnet50", "crowded": False},
    "the same beside a busy process for each core but one": {"case": "resnet50", "crowded": True},
    "2,000 tensors of 1,000, float32": {"case": "2000x1000", "hot": False},
    "the same, in cache": {"case": "2000x1000", "hot": True},
    "600 tensors of 1,000, in cache": {"case": "600x1000", "crowded": False},
    "the same beside a busy process for each core but one, mean": {"case": "600x1000", "crowded": True},
    "10,000 tensors of 64, float32": {"case": "10000x64"},
    "465 tensors of 1,000": {"case": "465x1000"},
    "the same, a group each": {"case": "465-groups"},
}
FAMILY = {"SGD, momentum": "sgd", "SGDW": "sgdw", "QHAdamW": "qhadamw", "LAMB, no clipping": "lamb", "Lion": "lion"}
FAMILY_CASES = {"GPT-2 124M": "gpt2-124m", "ResNet-50": "resnet50", "2,000 tensors of 1,000": "2000x1000"}


def results(suite: str) -> list[dict[str, Any]]:
    return list(json.loads((MACHINE / f"step-{suite}.json").read_text())["results"])


def find(measured: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the case with these options, where there is one: older files know fewer of them."""
    defaults = {"dtype": "float32", "crowded": False, **wanted}
    for result in measured:
        if all(result["config"].get(key, False) == value for key, value in defaults.items()):
            return result
    return None


def peer(result: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((timed for timed in result["peers"] if timed["name"] == name), None)


def milliseconds(timed: dict[str, Any] | None, key: str = "median_ms") -> str:
    return "has none" if timed is None else f"{timed[key]:.3g} ms"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 5 else f"{value:.2g}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steps() -> str:
    measured = results("cpu")
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
    return markdown(["AdamW step", "ours", "torch fused", "ours : torch fused", "ours : floor"], rows)


def family() -> str:
    measured = results("family")
    rows = []
    for label, optimizer in FAMILY.items():
        cells = []
        for case in FAMILY_CASES.values():
            result = find(measured, {"optimizer": optimizer, "case": case})
            ours = peer(result, "ours") if result else None
            if result is None or ours is None:
                cells += ["", "", ""]
                continue
            baseline = result["baseline"]
            other = peer(result, baseline)
            against = f"{times(ours.get(f'speed_against_{baseline}'))} x {baseline.removeprefix('torch-')}"
            cells += [milliseconds(ours), against if other else "no peer", times(ours["share_of_floor"])]
        rows.append([label, *cells])
    columns = [f"{case}{what}" for case in FAMILY_CASES for what in ("", ": speed", ": floor")]
    return markdown(["step, float32", *columns], rows)


TABLES = {"step-cpu": steps, "step-family": family}


def filled(text: str) -> str:
    """README's text with every table as the JSON has it."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: by bench/readme.py -->\n", "\n<!-- end -->"
        if text.count(begin) != 1:
            raise ValueError(f"README.md must hold {begin!r} once, but has it {text.count(begin)} times")
        before, _, rest = text.partition(begin)
        text = before + begin + make() + end + rest.partition(end)[2]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = filled(text)
    if options.check:
        if wanted != text:
            print("README.md's tables are not those of the committed JSON: python bench/readme.py", file=sys.stderr)
        return int(wanted != text)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
