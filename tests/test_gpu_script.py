"""bench/gpu.sh without a GPU: its parts, markers, time limit and archive. A stub replaces Python."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from commands import ROOT

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stub that records its arguments. It fails or sleeps if a file named fails or sleeps exists beside it."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\nhere=$(dirname "$0")\necho "$@" >> "$here/calls"\n'
        '[ -e "$here/sleeps" ] && sleep 60\n[ -e "$here/fails" ] && exit 1\nexit 0\n'
    )
    path.chmod(0o755)
    return path


def run(python: Path, *parts: str, **options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python), "DRY": "1", "OUT": str(python.parent / "out"), **options}
    return subprocess.run(
        ["bash", str(SCRIPT), *parts], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def calls(python: Path) -> list[str]:
    file = python.parent / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_all_parts_in_the_order_of_their_value(python: Path) -> None:
    done = run(python)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ["build", "step", "grid", "family", "update", "sanitizers", "suite"]
    assert [path.name for path in sorted(python.parent.glob("out/done/*"), key=os.path.getmtime)] == parts
    assert done.stdout.count("dry run: ") == len(parts), "each part must say that it is a dry run"
    assert [line.split()[0] for line in calls(python) if line.startswith("bench/")].count("bench/step.py") == 3


def test_what_is_done_is_not_done_again(python: Path) -> None:
    assert run(python, "update").returncode == 0
    before = calls(python)
    again = run(python, "update")
    assert again.returncode == 0 and "has been done" in again.stdout and calls(python) == before
    assert run(python, "update", FORCE="1").returncode == 0
    assert len(calls(python)) == 2 * len(before)


def test_a_part_that_is_cut_off_goes_on(python: Path) -> None:
    sleeps = python.parent / "sleeps"
    sleeps.touch()
    done = run(python, "update", LIMIT="1")
    assert done.returncode == 1 and "was cut off" in done.stdout
    assert not (python.parent / "out/done/update").exists()
    sleeps.unlink()
    assert run(python, "update").returncode == 0
    assert (python.parent / "out/done/update").exists()
    assert all("--resume" in call for call in calls(python))


def test_an_archive_of_another_machine_goes_on(python: Path) -> None:
    """The archive has the markers of finished parts, and of finished commands in a part that was interrupted."""
    out = python.parent / "out"
    assert run(python, "update").returncode == 0
    assert run(python, "step").returncode == 0
    (out / "done/step").unlink()
    (out / "ended/step.host").unlink()
    assert run(python, "build").returncode == 0  # writes the archive again
    archive, before = out / "results.tar.gz", len(calls(python))
    again = run(python, "update", "step", OUT=str(python.parent / "other"), FROM=str(archive))
    assert again.returncode == 0 and "update has been done" in again.stdout and "step has ended before" in again.stdout
    assert [call.split()[0] for call in calls(python)[before:]] == ["bench/host.py"]


def test_a_command_that_failed_before_still_fails_its_part(python: Path) -> None:
    (python.parent / "fails").touch()
    assert run(python, "update").returncode == 1
    (python.parent / "fails").unlink()
    (python.parent / "out/done/update").unlink()
    again = run(python, "update")
    assert again.returncode == 1 and "status 1" in again.stdout


def test_failures_are_told_and_the_other_parts_run(python: Path) -> None:
    (python.parent / "fails").touch()
    done = run(python, "update", "family")
    assert done.returncode == 1 and "update failed" in done.stdout and "step-gpu-family failed" in done.stdout


def test_one_archive_holds_everything(python: Path) -> None:
    run(python, "update")
    with tarfile.open(python.parent / "out/results.tar.gz") as archive:
        assert {"./update.txt", "./update.log", "./done/update"} <= set(archive.getnames())


def test_what_is_not_there(python: Path) -> None:
    done = run(python, "updates")
    assert done.returncode == 2 and "there is no part updates" in done.stderr
    done = run(python, "update", DRY="")
    assert done.returncode == 2 and "no torch that sees a GPU" in done.stderr and not (python.parent / "out").exists()
