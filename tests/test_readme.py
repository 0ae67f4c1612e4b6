"""The README's examples run, in order, as one program. (What cannot run here is not fenced as python.)"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from commands import ROOT, run
from torch import Tensor, nn

TEXT = (ROOT / "README.md").read_text()
FENCES = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
EXAMPLES = [
    (TEXT[: fence.start()].count("\n") + 2, fence[2]) for fence in FENCES.finditer(TEXT) if fence[1] == "python"
]


def test_the_examples_run_and_their_optimizers_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    params = list(model.parameters())
    batches = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(8)]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def make_grads() -> None:
        model.zero_grad()
        loss(batches[0]).backward()

    # What the examples take as given; each adds its own.
    names: dict[str, Any] = {"torch": torch, "model": model, "params": params, "batches": batches, "loss": loss}
    assert len(EXAMPLES) >= 4
    for line, code in EXAMPLES:
        make_grads()
        exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), names)  # tracebacks show its lines
        make_grads()
        before = [param.detach().clone() for param in params]
        names["optimizer"].step()
        unmoved = [index for index, (p, q) in enumerate(zip(params, before, strict=True)) if torch.equal(p, q)]
        assert not unmoved, f"after the example in line {line} of README.md"


def test_the_tables_are_those_of_the_committed_figures() -> None:
    """`python bench/readme.py` writes them."""
    run([sys.executable, "bench/readme.py", "--check"])
