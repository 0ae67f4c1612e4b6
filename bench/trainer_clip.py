"""Measures what clipping inside the step saves in Hugging Face's Trainer: clipping and step, timed in real trainings.

    python bench/trainer_clip.py          # into bench/results/<machine>/trainer_clip.md and trainer_clip.json

Four Trainers train a small GPT-2 on random tokens, in random order in each round:
- torch's fused AdamW, clipped by the Trainer
- ours, clipped by the Trainer
- ours with max_grad_norm, which clips inside the step; the Trainer still computes the norm for its log
- the same without the Trainer's norm (see docs/trainers.md)

The time is the sum of the Trainer's clipping or norm and of optimizer.step(). All must end with the same params, except
for rounding errors.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from environment import ROOT, describe, device_name, folder_name
from report import markdown

sys.path.append(str(ROOT))
sys.path.append(str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from fused_optim import FusedAdamW

MAX_NORM = 0.5  # below the norms of these gradients, so that clipping scales them
LR = 1e-4
STEPS, ROUNDS = 6, 7
TORCHS, OURS = "torch fused, clipped by the Trainer", "ours, clipped by the Trainer"
INSIDE, UNLOGGED = "ours, clipped inside", "ours, clipped inside, no norm in the log"
PEERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], float]] = {
    TORCHS: (torch.optim.AdamW, {"lr": LR, "fused": True}, MAX_NORM),
    OURS: (FusedAdamW, {"lr": LR}, MAX_NORM),
    INSIDE: (FusedAdamW, {"lr": LR, "max_grad_norm": MAX_NORM}, 0.0),
    UNLOGGED: (FusedAdamW, {"lr": LR, "max_grad_norm": MAX_NORM}, 0.0),
}


def timed(call: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return result

    return wrapped


def train(transformers: Any, peer: str, folder: str) -> tuple[float, torch.nn.Module]:
    """Trains one model. Returns the median milliseconds of clipping and step together, and the model."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=8192, n_positions=32, n_embd=512, n_layer=8, n_head=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(config.vocab_size, (STEPS, 16), generator=torch.Generator().manual_seed(1))
    kind, options, max_grad_norm = PEERS[peer]
    arguments = transformers.TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        max_grad_norm=max_grad_norm,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    kind_of_trainer = type("Unlogged", (transformers.Trainer,), {"_get_grad_norm": lambda *_, **__: None})
    make = kind_of_trainer if peer == UNLOGGED else transformers.Trainer
    trainer = make(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(kind, options))
    clips: list[float] = []
    steps: list[float] = []
    trainer.create_optimizer()
    trainer.accelerator.clip_grad_norm_ = timed(trainer.accelerator.clip_grad_norm_, clips)
    trainer.optimizer.step = timed(trainer.optimizer.step, steps)
    trainer.train()
    if len(steps) != STEPS or len(clips) not in (0, STEPS):
        raise RuntimeError(
            f"{STEPS} steps must be timed, with as many clippings or none, but got {len(steps)} steps and {len(clips)} "
            "clippings; this benchmark does not support the installed version of transformers"
        )
    both = [step + clip for step, clip in zip(steps, clips or [0.0] * STEPS, strict=True)]
    return 1e3 * statistics.median(both[1:]), model  # without the first, which makes states and tables


def main() -> None:
    transformers = importlib.import_module("trainers").require("transformers")
    found: dict[str, list[float]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(ROUNDS):
            models = {}
            for peer in random.sample(list(PEERS), len(PEERS)):
                milliseconds, models[peer] = train(transformers, peer, folder)
                found[peer].append(milliseconds)
            for model in models.values():
                for p, q in zip(model.parameters(), models[TORCHS].parameters(), strict=True):
                    torch.testing.assert_close(p, q, rtol=1e-3, atol=STEPS * LR * 0.1)
            print(f"round {round_ + 1} of {ROUNDS}", file=sys.stderr)

    device = torch.device("cpu")
    rows = []
    for peer, times in found.items():
        ratios = [theirs / own for theirs, own in zip(found[TORCHS], times, strict=True)]
        rows.append([peer, f"{statistics.median(times):.1f}", f"{min(times):.1f}", f"{statistics.median(ratios):.2f}"])
    elements = sum(p.numel() for p in models[TORCHS].parameters())
    text = (
        f"# Clipping in Hugging Face's Trainer\n\n{device_name(device)}, GPT-2 with {elements:,} float32 params, "
        f"{ROUNDS} trainings of {STEPS} steps each.\n\n"
        + markdown(["clipping and step", "median ms", "min ms", f"x {TORCHS}"], rows)
        + "\n\nThe last column is the median over the rounds of the ratio within a round.\n"
    )
    folder_ = ROOT / "bench" / "results" / folder_name(device)
    folder_.mkdir(parents=True, exist_ok=True)
    (folder_ / "trainer_clip.md").write_text(text)
    (folder_ / "trainer_clip.json").write_text(json.dumps({"environment": describe(device), "ms": found}, indent=1))
    print(text)


if __name__ == "__main__":
    main()
