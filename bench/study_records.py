"""The study's runs: the configuration that identifies a run, and the file that records the runs that are done."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. task: all settings of the task, as (name, value). split: the part of the data that scores the run,
    "valid" in the search and "test" in final runs."""

    task: tuple[tuple[str, str | int | float | bool], ...]
    optimizer: str
    lr: float
    decay: float
    epochs: int
    schedule: str
    seed: int
    split: str
    variant: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.task)

    @property
    def key(self) -> str:
        """The full configuration as JSON. Equal runs have equal keys in every process."""
        return json.dumps({**asdict(self), "task": self.settings}, sort_keys=True)

    def __str__(self) -> str:
        name = " ".join(filter(None, [str(self.settings["name"]), self.variant, self.optimizer]))
        return f"{name} {self.schedule} lr {self.lr:g} decay {self.decay:g} seed {self.seed}"


class Records:
    """A file of JSON lines, one for each run that is done: {"run": configuration, "outcome": ..., "made": ...}.

    A killed study can leave an incomplete last line. Opening the file removes it.

    Raises:
        ValueError: any other line is not a record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        self.made: list[dict[str, Any]] = []  # the distinct machines, versions and commits
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self._remember(json.dumps(record["run"], sort_keys=True), record["outcome"], record["made"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {self.path} must be a record of this study, but is not ({error!r}); delete it"
                ) from error

    def _remember(self, key: str, outcome: Outcome, made: dict[str, Any]) -> None:
        self.outcomes[key] = outcome
        if made not in self.made:
            self.made.append(made)

    def get(self, run: Run) -> Outcome | None:
        return self.outcomes.get(run.key)

    def add(self, run: Run, outcome: Outcome, made: dict[str, Any]) -> None:
        self._remember(run.key, outcome, made)
        line = json.dumps({"run": json.loads(run.key), "outcome": outcome, "made": made}, sort_keys=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
