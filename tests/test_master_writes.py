"""Master weights: writes of others to the params, copies and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    BY_NAME,
    Target,
    build,
    on_every_target,
    parameters,
    random_grads,
    set_grads,
)
from compare import assert_equal
from looks import LOOKS, choose
from master_weights import BF16, LOW, assert_same_path, side_by_side
from torch import nn

# ---- writes of others

MODEL_SHAPE = (6, 5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(MODEL_SHAPE, generator=torch.Generator().manual_seed(1)))


def trained(target: Target, **kwargs: Any) -> tuple[Model, Any]:
    """A model whose params have lower halves that are not 0."""
    model = Model()
    ours = build(ADAMW, target, model.parameters(), **kwargs)
    ours.lower_params()
    step(ours, 0)
    assert bool((ours.state[model.weight][LOW] != 0).any())
    return model, ours


def step(optimizer: Any, seed: int) -> None:
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), seed))
    optimizer.step()


NEW = torch.full(MODEL_SHAPE, 0.3).to(BF16)


def copy_in_place(model: Model) -> None:
    with torch.no_grad():
        model.weight.copy_(NEW)


def load(model: Model) -> None:
    model.load_state_dict({"weight": NEW})


def load_and_assign(model: Model) -> None:
    model.load_state_dict({"weight": NEW.clone()}, assign=True)


def assign_data(model: Model) -> None:
    model.weight.data = NEW.clone()


def swap(model: Model) -> None:
    torch.utils.swap_tensors(model.weight, nn.Parameter(NEW.clone()))


def initialise_again(model: Model) -> None:
    nn.init.constant_(model.weight, 0.3)


WRITES: list[Callable[[Model], None]] = [copy_in_place, load, assign_data, swap, initialise_again]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_of_others_are_noticed(
    write: Callable[[Model], None], look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, look)
    target = Target("reference", "cpu")
    model, ours = trained(target)
    write(model)
    fresh = nn.Parameter(model.weight.detach().float())
    wide = build(ADAMW, target, [fresh])
    wide.load_state_dict(
        {"state": {0: {k: v.clone() for k, v in ours.state[model.weight].items() if k != LOW}}}
        | {"param_groups": wide.state_dict()["param_groups"]}
    )
    with pytest.warns(UserWarning, match="1 params have been written to"):
        side_by_side(ours, wide, 1)
    assert_same_path(ours, wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        side_by_side(ours, wide, 2)  # its own steps are no writes of others
    assert_same_path(ours, wide)


@pytest.mark.filterwarnings("ignore:.*written to:UserWarning")
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_checkpoint_after_a_write_has_no_stale_halves(write: Callable[[Model], None]) -> None:
    model, ours = trained(Target("reference", "cpu"))
    write(model)
    saved = ours.state_dict()
    assert not saved["state"][0][LOW].any()
    assert_equal(ours.master_params(), [NEW.float()])


def test_a_write_between_lower_params_and_the_first_step() -> None:
    model = Model()
    ours = build(ADAMW, Target("reference", "cpu"), model.parameters())
    ours.lower_params()
    load(model)
    with pytest.warns(UserWarning, match="written to"):
        assert_equal(ours.master_params(), [NEW.float()])


def test_a_write_before_new_tables_are_due_anyway() -> None:
    model, ours = trained(Target("reference", "cpu"))
    load(model)
    ours.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=BF16))]})
    with pytest.warns(UserWarning, match="written to"):
        step(ours, 1)


def test_a_param_that_another_one_replaces_takes_its_place_without_halves() -> None:
    """load_state_dict(assign=True) puts another parameter into the model; the optimizer keeps stepping the old one, as
    torch's do."""
    model, ours = trained(Target("reference", "cpu"))
    old = model.weight
    before = ours.master_params()
    load_and_assign(model)
    assert model.weight is not old
    assert_equal(ours.master_params(), before)


@on_every_target
@pytest.mark.parametrize("ema_dtype", [None, BF16])
def test_ema_weights_is_no_write_of_others(ema_dtype: torch.dtype | None, target: Target) -> None:
    _, ours = trained(target, ema_decay=0.5, ema_dtype=ema_dtype)
    before = ours.master_params()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = r"master_params\(\) cannot be called inside of ema_weights"
        with ours.ema_weights(), pytest.raises(RuntimeError, match=text):
            ours.master_params()
        assert ours.state_dict()["state"][0][LOW].any()
        assert_equal(ours.master_params(), before)
        step(ours, 1)
        with ours.ema_weights():
            pass
        step(ours, 2)


# ---- checkpoints


def resumed(target: Target, saved: dict[str, Any], weights: dict[str, Any], model_first: bool) -> tuple[Model, Any]:
    model = Model().to(BF16)
    ours = build(ADAMW, target, model.parameters(), master_weights="exact")
    if model_first:
        model.load_state_dict(weights)
    ours.load_state_dict(saved)
    if not model_first:
        model.load_state_dict(weights)
    return model, ours


@on_every_target
@pytest.mark.parametrize("model_first", [True, False])
def test_resuming_is_like_not_having_stopped(model_first: bool, target: Target) -> None:
    model, ours = trained(target)
    file = io.BytesIO()
    torch.save([ours.state_dict(), model.state_dict()], file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    assert saved["state"][0][LOW].dtype == torch.int16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other_model, other = resumed(target, saved, weights, model_first)
        for seed in range(1, 4):
            step(ours, seed)
            step(other, seed)
    assert_equal(other.master_params(), ours.master_params())
    assert_equal(other.state[other_model.weight], ours.state[model.weight])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(way: Callable[[Any], Any]) -> None:
    model, ours = trained(Target("reference", "cpu"))
    other_model, other = way((model, ours))
    for seed in range(1, 3):
        step(ours, seed)
        step(other, seed)
    assert other.master_weights == "exact"
    assert_equal(other.master_params(), ours.master_params())
    load(other_model)
    with pytest.warns(UserWarning, match="written to"):
        step(other, 3)


@pytest.mark.parametrize("torchs", [True, False])
def test_checkpoints_without_halves_and_for_optimizers_without(torchs: bool) -> None:
    """Each loads the other's: without halves masters start at what the params hold; where none are wanted they go."""
    target = Target("reference", "cpu")
    _, ours = trained(target)
    plain_model = Model().to(BF16)
    kind: Any = torch.optim.AdamW if torchs else ADAMW.ours
    plain = kind(plain_model.parameters(), lr=0.01)
    plain.load_state_dict(ours.state_dict())
    step(plain, 1)
    if not torchs:
        assert LOW not in plain.state[plain_model.weight]
    saved = plain.state_dict()
    saved["state"][0].pop(LOW, None)
    _, other = resumed(target, saved, plain_model.state_dict(), True)
    assert_equal(other.master_params(), [plain_model.weight.detach().float()])
    step(other, 2)


def test_halves_survive_a_checkpoint_before_the_first_update() -> None:
    """SGD's buffers are left out where every step was skipped, the halves are not."""
    model = Model()
    ours = build(BY_NAME["sgd-dampening-maximize"], Target("reference", "cpu"), model.parameters(), skip_nonfinite=True)
    ours.lower_params()
    before = ours.master_params()
    set_grads(parameters(ours), [torch.full(MODEL_SHAPE, torch.nan, dtype=BF16)])
    ours.step()
    saved = ours.state_dict()["state"]
    assert list(saved[0]) == [LOW]
    assert_equal(ours.master_params(), before)


def test_halves_of_another_dtype_are_refused() -> None:
    _, ours = trained(Target("reference", "cpu"))
    saved = ours.state_dict()
    saved["state"][0] = {**saved["state"][0], LOW: saved["state"][0][LOW].float()}
    ours.load_state_dict(saved)
    with pytest.raises(
        RuntimeError, match=r'state "param_low" must be torch.int16 or torch.int8, but is torch.float32'
    ):
        step(ours, 1)
