"""README.md and the pages of docs/: their code runs, their commands print the output they show, and the files they name
exist."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, run
from distributed import World, in_every_world
from pages import PAGES, blocks, examples
from torch import Tensor, nn
from torch.optim import Optimizer

pytestmark = pytest.mark.slow
# Sections that run in other tests, which have the trainers' models and the converters' checkpoints.
ELSEWHERE = {
    "docs/migration.md": ["torch", "Apex", "DeepSpeed", "optimi", "bitsandbytes", "FlashOptim"],
    "docs/trainers.md": ["Hugging Face", "Accelerate", "Lightning", "timm", "A loop"],
}
DISTRIBUTED = "docs/distributed.md"
HERE = {
    page: here
    for page in PAGES
    if page != DISTRIBUTED
    and (here := [block for block in examples(page) if block.section not in ELSEWHERE.get(page, [])])
}


class Given:
    """The names that the examples assume: a model, its params, batches and their loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        self.batches = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(8)]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    @property
    def names(self) -> dict[str, Any]:
        params = list(self.model.parameters())
        return {"model": self.model, "params": params, "batches": self.batches, "loss": self.loss}


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize("page", HERE)
def test_the_examples_run_and_their_optimizers_step(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of a page run in order, as one program. After each example its optimizer must change every param."""
    monkeypatch.chdir(tmp_path)
    given = Given()
    names = given.names
    for block in HERE[page]:
        given.model.zero_grad()
        given.loss(given.batches[0]).backward()
        block.run(names)
        optimizer = names["optimizer"]
        params = params_of(optimizer)
        if {*params} != {*given.model.parameters()}:  # the example has its own model and makes the steps itself
            continue
        given.model.zero_grad()
        given.loss(given.batches[0]).backward()
        before = [param.detach().clone() for param in params]
        optimizer.step()
        unmoved = [index for index, (p, q) in enumerate(zip(params, before, strict=True)) if torch.equal(p, q)]
        assert not unmoved, f"after the example in line {block.line} of {page}"


class Net(nn.Module):
    """A model with blocks, as the page on distributed training assumes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.distributed
@in_every_world
def test_the_examples_of_distributed_training_run(world: World, tmp_path: Path) -> None:
    """Each section gets a new model. Its optimizer must change the params."""
    os.chdir(tmp_path)
    names: dict[str, Any] = {"mesh": world.mesh(), "device": torch.device(world.device), "step": 1}
    sections = {block.section: block for block in examples(DISTRIBUTED)}
    assert list(sections) == ["DDP", "FSDP2 and tensor parallelism", "ZeRO", "FSDP1", "Checkpoints"]
    for section, block in sections.items():
        torch.manual_seed(0)
        names["model"] = Net().to(world.device)
        if section == "Checkpoints":  # this section needs a distributed model
            sections["FSDP2 and tensor parallelism"].run(names)
        block.run(names)
        params, optimizer = list(names["model"].parameters()), names["optimizer"]
        before = [param.detach().clone() for param in params]
        names["model"](torch.ones(2, 4, device=world.device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True) if p.numel()]
        assert all(moved), section


COMMANDS = [
    (block.page, line.removeprefix("$ "), output)
    for page in PAGES
    for block in blocks(page)
    if block.kind == "console"
    for line, output in [block.code.split("\n", 1)]
]


@pytest.mark.parametrize(("page", "command", "output"), COMMANDS, ids=[command for _, command, _ in COMMANDS])
def test_commands_print_what_the_pages_show(page: str, command: str, output: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "python"
    assert run([sys.executable, *arguments]) == output, page


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`((?:bench|csrc|docs|fused_optim|tests|triton_kernels)/[\w./-]*)`", PAGES[page])
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_readme_is_short() -> None:
    assert PAGES["README.md"].count("\n") <= 150


def test_the_tables_are_those_of_the_committed_figures() -> None:
    """`python bench/readme.py` writes the tables."""
    run([sys.executable, "bench/readme.py", "--check"])
