"""The tasks of the study of all optimizers: trains and scores a run by its settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from study_data import Corpus
from study_family_data import mnist, python_library
from study_family_models import GPT, ConvNet
from study_family_optimizers import ENTRANTS, factor
from study_images import logits, shifted
from study_records import Outcome, Run
from study_tasks import Diverged, Place, error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

Batch = tuple[Tensor, Tensor]


def fit(run: Run, model: nn.Module, batches: Iterator[Batch], loss: Callable[[Batch], Tensor]) -> None:
    """Trains for the steps of the settings. The model ends with the weights that are evaluated.

    Raises:
        Diverged: the loss is infinite or NaN.
    """
    entrant, steps = ENTRANTS[run.optimizer], int(run.settings["steps"])
    optimizer = entrant.build(model, run.lr, run.decay, steps)
    schedule = (lambda step: factor(step, steps)) if entrant.scheduled else (lambda step: 1.0)
    scheduler = LambdaLR(optimizer, schedule)
    model.train()
    for batch in islice(batches, steps):
        value = loss(batch)
        if not math.isfinite(value.item()):
            raise Diverged
        value.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if not entrant.scheduled:
        optimizer.eval()  # type: ignore[attr-defined]
    model.eval()


def digit_batches(parts: Batch, size: int, reach: int, shuffle: torch.Generator) -> Iterator[Batch]:
    """Batches without end: every epoch takes each image once, in a new order, moved at random by up to `reach`."""
    images, labels = parts
    while True:
        for batch in torch.randperm(len(images), generator=shuffle).split(size):
            yield shifted(images[batch], reach, shuffle, mirror=False), labels[batch]


def train_digits(run: Run, place: Place) -> Outcome:
    settings = run.settings
    data = mnist(settings["images"])
    model = ConvNet(settings["width"]).to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shuffle = torch.Generator().manual_seed(run.seed)
    batches = digit_batches(data.train, settings["batch"], settings["reach"], shuffle)
    fit(run, model, batches, lambda batch: cross_entropy(model(batch[0]), batch[1]))
    images, labels = data.test if run.split == "test" else data.valid
    scores = logits(model, images)
    return {"score": cross_entropy(scores, labels).item(), "error": error(scores, labels)}


def text_batches(words: Tensor, size: int, context: int, shuffle: torch.Generator) -> Iterator[Batch]:
    """Batches without end: windows at random places of the text, and the words that follow each word of them."""
    while True:
        starts = torch.randint(len(words) - context - 1, (size, 1), generator=shuffle)
        places = starts + torch.arange(context)
        yield words[places], words[places + 1]


@torch.no_grad()
def nats_per_word(model: nn.Module, words: Tensor, context: int) -> float:
    """Mean negative log-probability of the next word, over all whole windows of the text side by side."""
    count = (len(words) - 1) // context
    here = words[: count * context].view(count, context)
    there = words[1 : count * context + 1].view(count, context)
    total = 0.0
    for x, y in zip(here.split(64), there.split(64), strict=True):
        total += cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / there.numel()


def corpus_of(settings: dict[str, Any]) -> Corpus:
    return python_library(settings["vocabulary"], settings["words"])


def train_gpt(run: Run, place: Place) -> Outcome:
    settings = run.settings
    corpus, context = corpus_of(settings), settings["context"]
    model = GPT(len(corpus.vocabulary), settings["size"], settings["layers"], settings["heads"], context)
    shuffle = torch.Generator().manual_seed(run.seed)
    batches = text_batches(corpus.train, settings["batch"], context, shuffle)
    fit(run, model, batches, lambda batch: cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()))
    nats = nats_per_word(model, corpus.test if run.split == "test" else corpus.valid, context)
    return {"score": nats if math.isfinite(nats) else None, "perplexity": math.exp(min(nats, 700.0))}


def train(run: Run, place: Place) -> Outcome:
    """Trains and scores a run on a CPU. A run that diverges has the score None."""
    torch.manual_seed(run.seed)
    begin = time.perf_counter()
    try:
        outcome = {"digits": train_digits, "gpt": train_gpt}[run.settings["name"]](run, place)
    except Diverged:
        return {"score": None, "diverged": True}
    return outcome | {"seconds": round(time.perf_counter() - begin, 3)}
