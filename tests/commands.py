"""Compiles code for the tests that inspect generated code instead of numbers. The flags are those of setup.py."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETUP: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="not main")


def run(command: list[str]) -> str:
    """Output of a command, stdout and stderr together. The command must succeed."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def rule_sources(tree: Path = ROOT) -> str:
    """The rules in C++."""
    return "\n".join(file.read_text() for file in sorted((tree / "csrc/rules").glob("*.h")))


def rule_structs() -> list[str]:
    """The names of the rules in C++."""
    lists = re.findall(r"using \w+Rules = RuleList<(.*?)>;", rule_sources(), re.DOTALL)
    return [name for listed in lists for name in re.split(r",\s+", listed)]
