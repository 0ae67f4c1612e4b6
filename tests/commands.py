"""Compiles code for the tests that inspect generated code instead of numbers. The flags are those of setup.py."""

from __future__ import annotations

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
