"""The tasks of the study: trains and scores a run by its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import study_data
import study_language
import study_pointer
import torch
from study_images import WideResNet, averaged_logits, logits, shifted
from study_optimizers import CONTENDERS, Clock, Groups, milliseconds, scheduler_for
from study_records import Outcome, Run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fused_optim.groups import layerwise

Settings = dict[str, Any]
LANGUAGE_MODELS = {"awd-lstm": study_language.awd_lstm, "qrnn": study_language.qrnn}
CLIP = 0.25  # maximum gradient norm of the language models, as in AWD-LSTM
OLD, NEW = range(0, 5), range(5, 10)  # classes for pretraining and for fine-tuning
ONE_LR, LAYERWISE = "one lr", "layer-wise lrs"
LAYER_FACTOR = 1 / 2.6  # lr of each stage relative to the one above it: ULMFiT, Howard and Ruder, arXiv:1801.06146


@dataclass(frozen=True)
class Place:
    """Where runs find their data and where they execute. It does not affect the results' meaning."""

    folder: Path | None = None
    device: str = "cpu"
    show: bool = False  # a progress bar for each run


class Diverged(Exception):
    """The loss is infinite or NaN."""


class Learner:
    """A model's optimizer, schedule and clock. groups: param groups, each with its lr."""

    def __init__(self, run: Run, groups: Groups, batches: int, clip: float | None = None) -> None:
        contender = CONTENDERS[run.optimizer]
        self.optimizer = contender.make(groups, run.decay)
        self.scheduler = scheduler_for(
            run.schedule, self.optimizer, contender, run.epochs, batches, run.settings["restart"]
        )
        timed = contender if run.split == "test" else None
        self.clock = Clock(self.optimizer, timed, run.lr, run.decay)
        self.params = self.clock.params
        self.clip = clip

    def update(self, loss: Callable[[], Tensor]) -> None:
        """One training step on the loss of a batch.

        Raises:
            Diverged: the loss is infinite or NaN.
        """

        def step() -> None:
            value = loss()
            value.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.params, self.clip)
            self.clock.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            if not math.isfinite(value.item()):
                raise Diverged

        compares = self.clock.compares
        duration = milliseconds(step, self.params[0].device)
        if not compares:
            self.clock.whole_ms.append(duration)


def epochs_of(run: Run, place: Place) -> Iterator[int]:
    return iter(tqdm(range(run.epochs), desc=str(run), unit="epoch", leave=False, disable=not place.show))


# ---- images


def images_of(settings: Settings, place: Place) -> study_data.Images:
    if settings["data"] == "scikit-learn's digits":
        return study_data.digits(settings["images"])
    folder = study_data.find(place.folder, "data_batch_1")
    assert folder is not None
    return study_data.cifar10(folder)


def on_device(data: study_data.Images, place: Place) -> study_data.Images:
    parts = ((x.to(place.device), y.to(place.device)) for x, y in (data.train, data.valid, data.test))
    return study_data.Images(*parts)


def wide_resnet(settings: Settings, data: study_data.Images, classes: int, place: Place) -> WideResNet:
    channels = data.train[0].shape[1]
    model = WideResNet(settings["depth"], settings["k"], channels, classes).to(place.device)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def error(scores: Tensor, labels: Tensor) -> float:
    """Percentage of the labels that the highest of the scores [N, classes] misses."""
    return 100 * (scores.argmax(1) != labels).double().mean().item()


def fit_images(run: Run, model: WideResNet, groups: Groups, data: study_data.Images, place: Place) -> Outcome:
    """Trains, and scores on the run's split: the cross-entropy and the error in percent. The test split adds the error
    with test-time augmentation, and in the schedules' task the curve of the error after each epoch."""
    settings = run.settings
    images, labels = data.train
    reach, mirror = settings["reach"], settings["mirror"]
    shuffle = torch.Generator().manual_seed(run.seed)
    batches = max(1, len(images) // settings["batch"])
    learner = Learner(run, groups, batches)
    scored_images, scored_labels = data.test if run.split == "test" else data.valid
    curve = []
    for _ in epochs_of(run, place):
        model.train()
        order = torch.randperm(len(images), generator=shuffle)[: batches * settings["batch"]]
        for batch in order.to(place.device).chunk(batches):
            x, y = shifted(images[batch], reach, shuffle, mirror), labels[batch]
            learner.update(lambda x=x, y=y: cross_entropy(model(x), y))  # type: ignore[misc]
        if settings["name"] == "schedules" and run.split == "test":
            curve.append(error(logits(model, scored_images), scored_labels))
    plain = logits(model, scored_images)
    outcome: Outcome = {
        "score": cross_entropy(plain, scored_labels).item(),
        "error": error(plain, scored_labels),
        "cost": learner.clock.summary(),
        "params": sum(param.numel() for param in learner.params),
    }
    if run.split == "test":
        outcome["error with tta"] = error(averaged_logits(model, scored_images, reach, mirror), scored_labels)
    return outcome | ({"curve": curve} if curve else {})


def train_images(run: Run, place: Place) -> Outcome:
    data = on_device(images_of(run.settings, place), place)
    model = wide_resnet(run.settings, data, 10, place)
    return fit_images(run, model, [{"params": list(model.parameters()), "lr": run.lr}], data, place)


# ---- fine-tuning


@lru_cache(maxsize=16)
def pretrained(task: tuple[tuple[str, str | int | float | bool], ...], seed: int, place: Place) -> dict[str, Tensor]:
    """The weights of a net trained on the old classes with this seed. All optimizers start from the same weights."""
    settings = dict(task)
    data = on_device(images_of(settings, place), place).only(OLD)
    torch.manual_seed(seed)
    model = wide_resnet(settings, data, len(OLD), place)
    epochs = int(settings["pretraining"])
    run = Run(task, "AdamW", 1e-2, 1e-1, epochs, "1cycle", seed, "valid")
    fit_images(run, model, [{"params": list(model.parameters()), "lr": run.lr}], data, place)
    return model.state_dict()


def train_finetune(run: Run, place: Place) -> Outcome:
    data = on_device(images_of(run.settings, place), place)
    weights = pretrained(run.task, run.seed, Place(place.folder, place.device))
    torch.manual_seed(run.seed)
    model = wide_resnet(run.settings, data, len(OLD), place)
    model.load_state_dict(weights)
    model.head = nn.Linear(model.head.in_features, len(NEW)).to(place.device)
    few = data.only(NEW).first(run.settings["per class"])
    factor = LAYER_FACTOR if run.variant == LAYERWISE else 1.0
    groups = layerwise(model, run.lr, factor, depth=lambda name, _: model.depth(name))
    return fit_images(run, model, groups, few, place)


# ---- language


def corpus_of(settings: Settings, place: Place) -> study_data.Corpus:
    if settings["data"] == "pydoc_data.topics":
        return study_data.python_topics(settings["vocabulary"], settings["words"])
    folder = study_data.find(place.folder, "wiki.train.tokens")
    assert folder is not None
    return study_data.wikitext2(folder)


def train_language(run: Run, place: Place) -> Outcome:
    """Trains, and scores the nats per word on the validation text. The test split adds perplexities without and with
    the pointer, whose theta and share are fitted to the validation text."""
    settings = run.settings
    corpus = corpus_of(settings, place)
    make = LANGUAGE_MODELS[settings["name"]]
    model = make(len(corpus.vocabulary), settings["size"], settings["layers"]).to(place.device)
    columns = study_language.streams(corpus.train, settings["batch"]).to(place.device)
    bptt = settings["bptt"]
    pieces = list(zip(columns[:-1].split(bptt), columns[1:].split(bptt), strict=True))
    learner = Learner(run, [{"params": list(model.parameters()), "lr": run.lr}], len(pieces), CLIP)
    for _ in epochs_of(run, place):
        model.train()
        states = model.begin(settings["batch"])
        for here, there in pieces:

            def loss(here: Tensor = here, there: Tensor = there) -> Tensor:
                nonlocal states
                scores, raw, dropped, states = model(here, states)
                penalty = study_language.activation_penalty(raw, dropped, settings["alpha"], settings["beta"])
                return cross_entropy(scores.flatten(0, 1), there.flatten()) + penalty

            learner.update(loss)
    nats = study_language.cross_entropy(model, corpus.valid)
    outcome: Outcome = {
        "score": nats if math.isfinite(nats) else None,
        "cost": learner.clock.summary(),
        "params": sum(param.numel() for param in learner.params),
    }
    return outcome | (score_language(model, corpus, settings["window"]) if run.split == "test" else {})


def score_language(model: study_language.LanguageModel, corpus: study_data.Corpus, window: int) -> Outcome:
    device = model.bias.device
    valid, test = corpus.valid.to(device), corpus.test.to(device)

    def decode(hidden: Tensor) -> Tensor:
        return model.decode(hidden).softmax(-1)

    theta, share, _ = study_pointer.tune(decode, study_language.outputs(model, valid[:-1]), valid[1:], window)
    scored = study_pointer.score(decode, study_language.outputs(model, test[:-1]), test[1:], theta, window)
    return {
        "perplexity": math.exp(scored.nats(0.0)),
        "perplexity with pointer": math.exp(scored.nats(share)),
        "pointer": {"theta": theta, "share": share},
    }


# ---- any task


def train(run: Run, place: Place) -> Outcome:
    """Trains and scores a run. A run that diverges has the score None."""
    name = run.settings["name"]
    work = {"finetune": train_finetune, "awd-lstm": train_language, "qrnn": train_language}.get(name, train_images)
    torch.manual_seed(run.seed)
    outcome: Outcome = {}
    try:
        seconds = milliseconds(lambda: outcome.update(work(run, place)), torch.device(place.device)) / 1e3
    except Diverged:
        return {"score": None, "diverged": True}
    return outcome | {"seconds": round(seconds, 3)}
