"""bfloat16 params with exact master weights: the steps of float32 params, bit for bit, and lower halves that are never
joined with a param that somebody else has written to."""

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
    AMSGRAD,
    BY_NAME,
    Case,
    Target,
    build,
    copies,
    for_every_case,
    for_every_class,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
)
from compare import assert_equal
from looks import LOOKS, choose
from torch import Tensor, nn

LOW = "param_low"
BF16 = torch.bfloat16


def lowered(case: Case, target: Target, params: list[nn.Parameter], **kwargs: Any) -> Any:
    """An optimizer of bfloat16 params whose masters are these numbers."""
    ours = build(case, target, copies(params), **kwargs)
    ours.lower_params()
    return ours


def side_by_side(ours: Any, wide: Any, steps: int, seed: int = 0) -> None:
    """Steps an optimizer with masters and one of float32 params with the same bfloat16 gradients."""
    for step in range(steps):
        grads = random_grads(parameters(wide), seed + step, BF16)
        set_grads(parameters(ours), grads)
        set_grads(parameters(wide), [grad.float() for grad in grads])
        ours.step()
        wide.step()


def assert_same_path(ours: Any, wide: Any) -> None:
    """Params and states, to the bit."""
    assert_equal(ours.master_params(), [p.detach() for p in parameters(wide)])
    for low, high in zip(parameters(ours), parameters(wide), strict=True):
        assert low.dtype == BF16
        assert_equal({k: v for k, v in ours.state[low].items() if k != LOW}, wide.state[high])


# ---- numbers


@pytest.mark.slow
@pytest.mark.compiled
@on_every_target
@for_every_case
def test_steps_are_those_of_float32_params(case: Case, target: Target) -> None:
    params = make_params()
    # The norm of bfloat16 gradients is summed in another order than that of float32 ones.
    ours, wide = (make(case, target, params, max_grad_norm=None) for make in (lowered, build))
    # Every step of plain PyTorch is the same code on equal bits, and slow.
    side_by_side(ours, wide, 20 if target.backend == "reference" else quick(target, 100, 3))
    assert_same_path(ours, wide)


@on_every_target
@for_every_rule
def test_with_all_that_a_step_can_do(case: Case, target: Target) -> None:
    """Averages of the weights are those of the masters; clipping, skipping and grad_scale change nothing."""
    extra = {"ema_decay": 0.9, "max_grad_norm": 0.5, "skip_nonfinite": True}
    params = make_params(((3, 5), (130,), (4099,)))
    ours, wide = lowered(case, target, params, **extra), build(case, target, params, **extra)
    for step in range(quick(target, 6, 3)):
        grads = random_grads(params, step, torch.float32)
        if step == 1:
            grads[0][0] = torch.inf
        for optimizer in (ours, wide):
            set_grads(parameters(optimizer), grads)
            optimizer.step(grad_scale=2.0)
    assert_same_path(ours, wide)
    assert_equal([ours.ema[p] for p in parameters(ours)], [wide.ema[p] for p in parameters(wide)])


@on_every_target
@for_every_class
def test_a_bfloat16_model_starts_at_what_it_shows(case: Case, target: Target) -> None:
    params = make_params(dtype=BF16)
    ours = build(case, target, copies(params), master_weights="exact", max_grad_norm=None)
    wide = build(case, target, [nn.Parameter(p.detach().float()) for p in params], max_grad_norm=None)
    side_by_side(ours, wide, quick(target, 5, 2))
    assert_same_path(ours, wide)


@on_every_target
@pytest.mark.parametrize("state_dtype", [BF16, torch.float16])
def test_narrow_states(state_dtype: torch.dtype, target: Target) -> None:
    params = make_params()
    ours, wide = (make(AMSGRAD, target, params, state_dtype=state_dtype) for make in (lowered, build))
    side_by_side(ours, wide, quick(target, 5, 2))
    assert_same_path(ours, wide)


@on_every_target
def test_float32_and_float16_gradients(target: Target) -> None:
    for dtype in (torch.float32, torch.float16):
        params = make_params(((40,), (5, 7)))
        ours, wide = lowered(ADAMW, target, params), build(ADAMW, target, params)
        for step in range(2):
            grads = random_grads(params, step, dtype)
            set_grads(parameters(ours), grads)
            set_grads(parameters(wide), [grad.float() for grad in grads])
            ours.step()
            wide.step()
        assert_same_path(ours, wide)


@on_every_target
def test_params_of_any_layout(target: Target) -> None:
    """Transposed, channels_last, with holes, and at odd addresses; nothing around a view is touched."""

    def laid_out() -> list[Tensor]:
        buffers = [torch.full((300,), 7.0), torch.full((300,), 7.0)]
        plain = torch.linspace(-2.0, 3.0, 120)
        return [
            plain.clone().view(10, 12).t(),
            plain.clone().view(2, 3, 4, 5).to(memory_format=torch.channels_last),
            buffers[0][3:123].copy_(plain),
            buffers[1][5:245:2].copy_(plain),
        ]

    wide_params = [nn.Parameter(x) for x in laid_out()]
    buffers = [torch.full((300,), 7.0, dtype=BF16) for _ in range(2)]
    narrow = [x.to(BF16) for x in laid_out()]
    narrow[2] = buffers[0][3:123].copy_(narrow[2])
    narrow[3] = buffers[1][5:245:2].copy_(narrow[3])
    for wide_param, param in zip(wide_params, narrow, strict=True):
        wide_param.data.copy_(param)
    ours = build(ADAMW, target, [nn.Parameter(x) for x in narrow], master_weights="exact")
    wide = build(ADAMW, target, wide_params)
    side_by_side(ours, wide, 3)
    assert_same_path(ours, wide)
    around = [buffers[0][:3], buffers[0][123:], buffers[1][:5], buffers[1][6:245:2], buffers[1][245:]]
    assert all(bool((x == 7).all()) for x in around)


@on_every_target
def test_other_dtypes_are_left_alone(target: Target) -> None:
    dtypes = [torch.float32, torch.float64, torch.complex64]
    params = [make_params(((9,),), dtype)[0] for dtype in dtypes]
    ours = build(ADAMW, target, copies(params), master_weights="exact")
    plain = build(ADAMW, target, copies(params))
    ours.lower_params()
    for optimizer in (ours, plain):
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p)
    ours.master_params()
    low, *others = parameters(ours)
    assert low.dtype == BF16 and [p.dtype for p in others] == dtypes[1:]
    assert [p.dtype for p in ours.master_params()] == dtypes
    ours.step()
    plain.step()
    assert_equal([p.detach() for p in others], [p.detach() for p in parameters(plain)[1:]])
    assert all(LOW not in ours.state[p] for p in others)


# ---- lower_params and master_params


def test_lower_params_keeps_every_bit() -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, 1e-40, 3.4e38, 1 + 2**-8])])
    param = nn.Parameter(values.clone())
    ours = build(ADAMW, Target("reference", "cpu"), [param])
    same = param
    ours.lower_params()
    assert param is same and param.dtype == BF16 and ours.master_weights == "exact"
    assert torch.equal(param.detach()[:1000], values[:1000].to(BF16))
    assert torch.equal(ours.master_params()[0].view(torch.int32), values.view(torch.int32))
    ours.lower_params()  # nothing is left to do
    assert torch.equal(ours.master_params()[0].view(torch.int32), values.view(torch.int32))


def test_lower_params_in_the_middle_of_training() -> None:
    target = Target("reference", "cpu")
    params = make_params()
    ours, wide = build(AMSGRAD, target, copies(params)), build(AMSGRAD, target, params)
    for step in range(3):
        for optimizer in (ours, wide):
            set_grads(parameters(optimizer), random_grads(params, step))
            optimizer.step()
    ours.zero_grad()
    ours.lower_params()
    side_by_side(ours, wide, 3)
    assert_same_path(ours, wide)


def test_master_params_come_in_the_order_of_the_groups() -> None:
    params = make_params(((2,), (3,), (4,)), dtype=BF16)
    ours = build(
        ADAMW, Target("reference", "cpu"), [{"params": params[2:]}, {"params": params[:2]}], master_weights="exact"
    )
    assert [tuple(p.shape) for p in ours.master_params()] == [(4,), (2,), (3,)]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ours.master_params())


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


# ---- errors


def test_bad_input() -> None:
    bf16, f16 = (nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (BF16, torch.float16))
    with pytest.raises(ValueError, match='master_weights must be None or "exact" or "24bit", but got \'16bit'):
        ADAMW.ours([bf16], master_weights="16bit")
    with pytest.raises(TypeError, match=r'master_weights="exact" is for bfloat16 params, but got one of torch.float16'):
        ADAMW.ours([f16], master_weights="exact")
    ours = ADAMW.ours([bf16])
    with pytest.raises(ValueError, match=r"lower_params\(\) makes bfloat16 params, but got torch.float16"):
        ours.lower_params(torch.float16)
    with pytest.raises(ValueError, match="pass master_weights="):
        ours.lower_params(master_weights=None)
    with pytest.raises(TypeError, match="is for bfloat16 params"):
        ADAMW.ours([f16]).lower_params()
    wide = nn.Parameter(torch.zeros(3))
    wide.grad = torch.ones(3)
    ours = ADAMW.ours([nn.Parameter(torch.zeros(2)), wide])
    with pytest.raises(RuntimeError, match=r"params without gradients, but one of shape \(3,\) has a gradient"):
        ours.lower_params()
    assert {p.dtype for p in parameters(ours)} == {torch.float32} and ours.master_weights is None
