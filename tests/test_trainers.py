"""Hugging Face's Trainer and Accelerate with our optimizer, compared with the same training with torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from compare import assert_equal
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from trainers import (
    ADAMW,
    assert_stepped,
    assert_trained_alike,
    loader,
    loss_of,
    net,
    on_cpp,
    ours,
    require,
    run_page,
    torchs,
)

from fused_optim import FusedAdamW

pytestmark = [pytest.mark.trainers, on_cpp]
STEPS = 8


@pytest.fixture
def accelerate() -> ModuleType:
    """The module with its global state reset. All trainers in this file share that state."""
    module = require("accelerate")
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()
    return module


# ---- Hugging Face


@pytest.fixture
def transformers(accelerate: ModuleType) -> ModuleType:
    return require("transformers")


def gpt2(transformers: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def dataset() -> list[dict[str, Any]]:
    tokens = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(transformers: ModuleType, folder: Path, **options: Any) -> Any:
    defaults = {"max_steps": STEPS, "save_strategy": "no", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.0}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    return transformers.TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=4, **{**defaults, **quiet, **options}
    )


def trainer(transformers: ModuleType, folder: Path, options: dict[str, Any], **kwargs: Any) -> Any:
    args = arguments(transformers, folder, **options)
    model = kwargs.pop("model", None) or gpt2(transformers)
    return transformers.Trainer(model, args, train_dataset=dataset(), **kwargs)


def inner(optimizer: Any) -> Optimizer:
    """The optimizer that Accelerate's wrapper contains."""
    return optimizer.optimizer


CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped by the trainer": {"max_grad_norm": 0.05},
    "accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_hugging_face(options: dict[str, Any], transformers: ModuleType, tmp_path: Path) -> None:
    kinds: list[tuple[type[Optimizer], dict[str, Any]]] = [
        (FusedAdamW, ADAMW),
        (torch.optim.AdamW, {**ADAMW, "foreach": False}),
    ]
    pair = []
    for kind in kinds:
        run = trainer(transformers, tmp_path, options, optimizer_cls_and_kwargs=kind)
        run.train()
        pair.append(inner(run.optimizer))
    assert [group["weight_decay"] for group in pair[0].param_groups] == [0.1, 0.0]
    assert_stepped(pair[0], STEPS)
    assert_trained_alike(*pair, bits=16 if "bf16" in options else 32)


def test_hugging_face_takes_an_optimizer_and_its_schedule(transformers: ModuleType, tmp_path: Path) -> None:
    """Clipping inside the step equals clipping by the trainer."""
    pair = []
    for build, options, more in (
        (ours, {}, {"max_grad_norm": 0.05}),
        (torchs, {"max_grad_norm": 0.05}, {}),
    ):
        model = gpt2(transformers)
        optimizer = build(model.parameters(), **more)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        run = trainer(transformers, tmp_path, options, model=model, optimizers=(optimizer, schedule))
        run.train()
        assert inner(run.optimizer) is optimizer
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ADAMW["lr"] / (1 + STEPS))
        pair.append(optimizer)
    assert_stepped(pair[0], STEPS)
    assert pair[0].last_grad_norm > 0.05
    assert_trained_alike(*pair)


def test_hugging_face_resumes(transformers: ModuleType, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    kind = FusedAdamW, {**ADAMW, "max_grad_norm": 0.05, "ema_decay": 0.9}
    whole, resumed = (
        trainer(transformers, tmp_path / name, options, optimizer_cls_and_kwargs=kind) for name in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_stepped(inner(resumed.optimizer), STEPS)
    assert_equal([*resumed.model.parameters()], [*whole.model.parameters()])
    assert_equal(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_hugging_face_goes_on_from_a_checkpoint_of_torchs(transformers: ModuleType, tmp_path: Path) -> None:
    """The first part of the training uses torch's class, the rest uses ours."""
    options = {"save_strategy": "steps", "save_steps": 3}
    theirs = torch.optim.AdamW, {**ADAMW, "foreach": False}
    whole = trainer(transformers, tmp_path / "whole", options, optimizer_cls_and_kwargs=theirs)
    changed = trainer(transformers, tmp_path / "changed", options, optimizer_cls_and_kwargs=(FusedAdamW, ADAMW))
    whole.train()
    changed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_stepped(inner(changed.optimizer), STEPS)
    assert_trained_alike(inner(changed.optimizer), inner(whole.optimizer))


def test_hugging_face_page(transformers: ModuleType, tmp_path: Path) -> None:
    known = run_page(
        "Hugging Face", model=gpt2(transformers), arguments=arguments(transformers, tmp_path), data=dataset()
    )
    assert_stepped(inner(known["trainer"].optimizer), STEPS)
    assert known["norm"] > 0


# ---- Accelerate


class Run:
    """The objects of a script that uses Accelerate."""

    def __init__(self, accelerate: ModuleType, build: Callable[..., Any], options: dict[str, Any], **kwargs: Any):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        model = net()
        self.plain = build(model.parameters(), **kwargs)
        schedule = LambdaLR(self.plain, lambda step: min(1.0, (step + 1) / 4))
        self.model, self.optimizer, self.data, self.schedule = self.accelerator.prepare(
            model, self.plain, loader(STEPS), schedule
        )

    def epoch(self, clip: float | None = None) -> None:
        for batch in self.data:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, batch))
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("clips", ["nobody", "accelerator", "step"])
def test_accelerate(clips: str, precision: str, accumulate: int, accelerate: ModuleType) -> None:
    options = {"mixed_precision": precision, "gradient_accumulation_steps": accumulate}
    bound = None if clips == "nobody" else 1.0
    mine = Run(accelerate, ours, options, **({"max_grad_norm": bound} if clips == "step" else {}))
    theirs = Run(accelerate, torchs, options)
    mine.epoch(bound if clips == "accelerator" else None)
    theirs.epoch(bound)
    assert mine.optimizer.optimizer is mine.plain
    assert_stepped(mine.plain, STEPS // accumulate)
    assert_trained_alike(mine.plain, theirs.plain, bits=32 if precision == "no" else 16)


def test_accelerate_resumes(accelerate: ModuleType, tmp_path: Path) -> None:
    whole, resumed = (Run(accelerate, ours, {}, max_grad_norm=1.0, ema_decay=0.9) for _ in range(2))
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.epoch()
    assert_stepped(resumed.plain, 2 * STEPS)
    assert resumed.plain.ema_state_dict()["steps"] == 2 * STEPS
    assert_equal([*resumed.model.parameters()], [*whole.model.parameters()])
    assert_equal(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_accelerate_with_a_scaler(accelerate: ModuleType) -> None:
    """Accelerator refuses fp16 on the CPU, so the test creates the wrapper that Accelerator creates on GPUs. The first
    steps overflow."""
    accelerate.Accelerator(cpu=True)
    pair = []
    for build in (ours, torchs):
        model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=2.0**20)
        plain = build(model.parameters())
        optimizer = accelerate.optimizer.AcceleratedOptimizer(plain, scaler=scaler)
        for batch in loader(2 * STEPS):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            optimizer.step()
            assert not (optimizer.step_was_skipped and build is ours)  # Accelerate cannot see that our step skips
            optimizer.zero_grad()
        assert scaler.get_scale() < 2.0**20
        pair.append(plain)
    skipped = 2 * STEPS - int(pair[1].state_dict()["state"][0]["step"])
    assert skipped > 0
    assert_stepped(pair[0], 2 * STEPS - skipped)
    assert_trained_alike(*pair, bits=16)


def test_accelerate_page(accelerate: ModuleType) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    known = run_page("Accelerate", accelerator=accelerator, model=net(), loader=loader(STEPS), loss_of=loss_of)
    assert_stepped(known["optimizer"].optimizer, STEPS // 2)
