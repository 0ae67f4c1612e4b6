"""PyTorch Lightning with our optimizer, compared with the same training with torch's: closures, clipping, mixed
precision.

Under mixed precision Lightning refuses to clip for optimizers that unscale gradients themselves, such as torch's fused
ones and ours. Our optimizers clip inside the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from compare import assert_equal
from torch.optim.lr_scheduler import LambdaLR
from trainers import assert_stepped, assert_trained_alike, loader, loss_of, net, on_cpp, ours, require, run_page, torchs

pytestmark = [
    pytest.mark.trainers,
    on_cpp,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on workers and logging intervals
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),  # caused by Lightning's code
]
STEPS = 8  # per epoch
BOUND = 1.0
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    **dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False),
}


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    module = require("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return module


def fit(lightning: ModuleType, build: Callable[..., Any], options: dict[str, Any], ckpt: Path | None = None) -> Any:
    """Trains and returns the trainer. The training takes one epoch unless options set another number."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> Any:
            optimizer = build(self.parameters())
            schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    trainer = lightning.Trainer(**QUIET, **{"max_epochs": 1, "plugins": [], **options})
    trainer.fit(Module(), loader(STEPS), ckpt_path=ckpt)
    return trainer


def clipping(params: Any, **options: Any) -> Any:
    return ours(params, max_grad_norm=BOUND, **options)


def float16(lightning: ModuleType) -> Any:
    """The plugin that Trainer(precision="16-mixed") creates on a GPU. On the CPU the trainer would use bf16-mixed
    instead."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return lightning.plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": BOUND}],
    ids=["plain", "accumulated", "clipped"],
)
def test_like_torch(options: dict[str, Any], lightning: ModuleType) -> None:
    mine, theirs = (fit(lightning, build, options).optimizers[0] for build in (ours, torchs))
    assert_stepped(mine, STEPS // options.get("accumulate_grad_batches", 1))
    assert_trained_alike(mine, theirs)


def test_clipping_in_the_step_is_clipping_by_the_trainer(lightning: ModuleType) -> None:
    mine = fit(lightning, clipping, {}).optimizers[0]
    theirs = fit(lightning, torchs, {"gradient_clip_val": BOUND}).optimizers[0]
    assert_stepped(mine, STEPS)
    assert mine.last_grad_norm > BOUND
    assert_trained_alike(mine, theirs)


def test_mixed_precision(lightning: ModuleType) -> None:
    """The trainer clips for torch's for-loop. Our optimizer clips inside the step."""
    for precision in ("bf16-mixed", "16-mixed"):

        def options(clip: float | None, precision: str = precision) -> dict[str, Any]:
            kind = {"precision": precision} if precision == "bf16-mixed" else {"plugins": [float16(lightning)]}
            return {"gradient_clip_val": clip, **kind}

        mine = fit(lightning, clipping, options(None)).optimizers[0]
        theirs = fit(lightning, torchs, options(BOUND)).optimizers[0]
        assert_stepped(mine, STEPS)
        assert mine.last_grad_norm > BOUND
        assert_trained_alike(mine, theirs, bits=16)
        with pytest.raises(RuntimeError, match="FusedAdamW, does not allow for gradient clipping"):
            fit(lightning, ours, options(BOUND))


def test_an_overflow_is_skipped(lightning: ModuleType) -> None:
    counts = []
    for build in (clipping, torchs):
        plugin = float16(lightning)
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        optimizer = fit(lightning, build, {"max_epochs": 2, "plugins": [plugin]}).optimizers[0]
        assert plugin.scaler.get_scale() < 2.0**20
        counts.append([state["step"].item() for state in optimizer.state.values()])
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < 2 * STEPS


def test_resumes(lightning: ModuleType, tmp_path: Path) -> None:
    def averaging(params: Any) -> Any:
        return clipping(params, ema_decay=0.9)

    half = fit(lightning, averaging, {})
    half.save_checkpoint(tmp_path / "half.ckpt")
    whole = fit(lightning, averaging, {"max_epochs": 2})
    resumed = fit(lightning, averaging, {"max_epochs": 2}, tmp_path / "half.ckpt")
    assert_stepped(resumed.optimizers[0], 2 * STEPS)
    assert_equal([*resumed.model.parameters()], [*whole.model.parameters()])
    assert_equal(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    assert "ema" in resumed.optimizers[0].state_dict()["state"][0]


def test_page(lightning: ModuleType) -> None:
    known = run_page("Lightning", net=net, loss_of=loss_of, loader=loader(STEPS), options=QUIET)
    assert_stepped(known["trainer"].optimizers[0], STEPS)
