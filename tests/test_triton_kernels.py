"""Results of the Triton kernels on tables built by hand, compared with the same step in float64.

They run in Triton's interpreter (`TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py`), in the PTX interpreter
(`FUSED_OPTIM_TEST_BACKENDS=triton-ptx`), or on a GPU if there is one.
"""

import math

import pytest
import torch
from cases import Case, for_every_rule
from fused_optim.triton_kernels.rules import RULES as RULES_OF_TRITON
from triton_tables import BF16, DEVICE, F16, F32, F64, KINDS, RUNNING, RUNS, STATES, Group, Row, Table, rows_of

from fused_optim.backends.reference import bias_correction
from fused_optim.backends.reference_rules import RULES as RULES_OF_THE_REFERENCE
from fused_optim.backends.reference_rules import BiasCorrections
from fused_optim.engine.layout import TensorScalars

# Otherwise nothing can run a kernel, and no test is collected.
__test__ = RUNS
pytestmark = [pytest.mark.compiled, pytest.mark.backend]

SIZES = (0, 1, 31, 4095, 4096, 4097, 9000)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str) -> None:
    Table([Row(size, KINDS[kind]) for size in SIZES]).check_step()


def test_kinds_share_one_launch() -> None:
    Table([Row(700 + 900 * i, dtypes, seed=i) for i, dtypes in enumerate(KINDS.values())]).check_step()


@pytest.mark.parametrize("stream", range(5))
def test_misaligned_views(stream: int) -> None:
    offsets = [int(i == stream) for i in range(5)]
    kinds = KINDS["f32 amsgrad"], KINDS["bf16 amsgrad"]
    Table([Row(size, kind, offsets=offsets) for kind in kinds for size in (3, 130, 1500)]).check_step()


def test_beyond_32_bits() -> None:
    """The table has only the last chunk of a tensor with more than 2**32 elements. The rest is never accessed, so it is
    not allocated."""
    rows = [Row(1030, KINDS[kind]) for kind in ("f32", "bf16", "f64")]
    Table(rows, chunks_before=2**20).check_step()


@pytest.mark.parametrize(
    "group",
    [
        Group(maximize=True),
        Group(weight_decay=0.1),
        Group(weight_decay=0.1, maximize=True),
        Group(weight_decay=0.1, decoupled=True),
        Group(beta1=0.0, beta2=0.0),
        Group(lr=0.0, weight_decay=0.1, decoupled=True),
    ],
    ids=str,
)
def test_options(group: Group) -> None:
    table = Table([Row(1000, KINDS["f32"]), Row(1000, KINDS["bf16 amsgrad"])], [group])
    table.check_step()
    table.check_step()


def test_groups_differ() -> None:
    groups = [Group(lr=10.0**-i, beta1=0.02 * i, weight_decay=0.01 * i, decoupled=i % 2 == 0) for i in range(40)]
    rows = [Row(i, KINDS["f32"], group=i) for i in range(40)]
    for row in rows:
        row.step += row.group_index % 7
    Table(rows, groups).check_step()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_lr_tensor(dtype: torch.dtype) -> None:
    lr = torch.tensor(0.3, dtype=dtype, device=DEVICE)
    table = Table([Row(50, KINDS["f32"]), Row(50, KINDS["f64"], group=1)], [Group(lr=7.0, lr_tensor=lr), Group()])
    table.check_step()
    lr.fill_(0.05)
    table.check_step()


def test_grad_scale() -> None:
    scale = torch.tensor([1024.0], device=DEVICE)
    found = torch.tensor([0.0], device=DEVICE)
    Table([Row(600, KINDS[kind]) for kind in ("f32", "f16", "f64")], grad_scale=scale, found_inf=found).check_step()


@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.inf, math.nan])
def test_found_inf_skips(found_inf: float) -> None:
    """`found_inf` is a sum over devices. The states of a skipped tensor may be uninitialized memory."""
    rows = [Row(size, KINDS["f32"]) for size in (5, 1000)]
    for row in rows:
        for state in row.views[2:]:
            state.fill_(math.nan)
    table = Table(rows, found_inf=torch.tensor([found_inf], device=DEVICE))
    table.check_step(skipped=(0, 1))
    for row in rows:
        for state in row.views[2:]:
            state.zero_()
    table.found_inf = torch.zeros(1, device=DEVICE)
    table.check_step()


def test_no_gradient_leaves_the_tensor_alone() -> None:
    rows = [Row(size, KINDS["f32"], seed=size) for size in (100, 5000, 7, 300)]
    addresses = [row.grad_address for row in rows]
    rows[1].grad_address = rows[2].grad_address = 0
    table = Table(rows)
    table.check_step(skipped=(1, 2))
    rows[1].grad_address, rows[2].grad_address = addresses[1:3]
    table.check_step()
    assert [row.step.item() for row in rows] == [2, 1, 1, 2]


@pytest.mark.parametrize("rule", [rule for rule in RULES_OF_THE_REFERENCE if rule in RUNNING])
def test_prep_is_exact(rule: str) -> None:
    """Every scalar is bitwise equal: float64 on the device rounds like Python's float."""

    one_cycle = Group(lr=0.3, beta1=0.95, beta2=0.9999, weight_decay=0.1, decoupled=True, option_a=0.3, option_b=0.999)
    clipped = Group(maximize=True, weight_decay=0.2, max_norm=0.01, option_a=0.0, option_b=0.0)
    normalized = Group(
        weight_decay=0.2, decoupled=True, lr_reference=0.07, decay_period=390.0, option_a=1.0, option_b=0
    )
    small = Group(beta1=3e-6, beta2=0.4999, option_a=0.3, option_b=0.0)
    groups = [one_cycle, clipped, normalized, small]
    steps = [1, 2, 3, 10, 999, 123457, 2**24] * 5
    rows = [
        Row(1, (F32,) * (2 + len(STATES[rule])), signed=0, group=i % 4, begun=i % 2 == 0) for i in range(len(steps))
    ]
    for row, step in zip(rows, steps, strict=True):
        row.step.fill_(step - 1)
    table = Table(rows, groups, rule, grad_scale=torch.tensor([3.0], device=DEVICE))
    table.launch()
    for number, step in enumerate(steps):
        group = groups[number % 4]
        scale = 1.0 / 3.0
        if group.max_norm:
            scale *= group.max_norm / (math.sqrt(table.squares.item()) * scale + group.clip_eps)
        decay = group.lr / group.lr_reference * group.weight_decay / math.sqrt(group.decay_period)
        if RULES_OF_TRITON[rule].scales_decay:
            decay = group.weight_decay / group.lr_reference / math.sqrt(group.decay_period)
        correction1, correction2 = bias_correction(group.beta1, step), bias_correction(group.beta2, step)
        expected = TensorScalars(
            lr=group.lr,
            eps=group.eps,
            weight1=1.0 - group.beta1,
            weight2=1.0 - group.beta2,
            small_beta1=group.beta1 if group.beta1 < 0.5 else 0.0,
            small_beta2=group.beta2 if group.beta2 < 0.5 else 0.0,
            step_size=group.lr / correction1,
            debias=1.0 / correction1,
            denom_scale=1.0 / math.sqrt(correction2),
            grad_factor=-scale if group.maximize else scale,
            l2=0.0 if group.decoupled else group.weight_decay,
            decay=decay if group.decoupled else 0.0,
            cautious_decay=0.0,
            ema_weight=1.0 if step == 1 and not rows[number].begun else 1.0 - group.ema_decay,
            skip=0.0,
        )
        scalars = RULES_OF_THE_REFERENCE[rule].scalars
        at = BiasCorrections(step, correction1, correction2, bias_correction(group.beta3, step))
        running = [[*RUNNING[rule].values()]] if RUNNING[rule] else []  # the start values
        own = scalars(group.hparams(), at, *running) if scalars else ()
        common = len(TensorScalars._fields) - len(TensorScalars._field_defaults)
        found, count = table.tensor_scalars[number].tolist(), len(own)
        assert found[:common] == [*expected[:common]]
        # numpy's exp and log may differ from Python's in the last place. An option that a rule does not have is NaN.
        slack = 1e-14 if rule in ("adopt", "ademamix", "nadam") else 0
        assert tuple(found[common : common + count]) == pytest.approx(own, rel=slack, abs=0, nan_ok=True)


AVERAGED = {
    "f32": (F32,) * 5,
    "f32 amsgrad": (F32,) * 6,
    "bf16": (BF16,) * 5,
    "bf16 amsgrad, f32 average": (*(BF16,) * 5, F32),
    "bf16, f32 states and average": (BF16, BF16, F32, F32, F32),
    "f16, f32 states, bf16 average": (F16, F16, F32, F32, BF16),
    "f64": (F64,) * 5,
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averages(kind: str) -> None:
    groups = [Group(ema_decay=decay) for decay in (0.9, 0.0, 1.0)]
    rows = [Row(size, AVERAGED[kind], group=i % 3, ema=True) for i, size in enumerate((0, 1, 31, 4097))]
    table = Table(rows, groups)
    table.check_step()
    table.check_step()


def test_averages_of_kinds_that_share_a_launch() -> None:
    rows = [Row(500 + 900 * i, dtypes, seed=i, ema=True) for i, dtypes in enumerate(AVERAGED.values())]
    rows += [Row(700, AVERAGED["f32"], offsets=[0] * i + [1], ema=True, begun=True) for i in range(5)]
    rows.append(Row(90, AVERAGED["f32"], ema=True))
    rows[-1].grad_address = 0
    Table(rows).check_step(skipped=(len(rows) - 1,))


@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "qhadam", "lion", "lamb"])
def test_averages_of_rules(name: str) -> None:
    rule, group, states = RULES[name]
    rows = [Row(size, (F32,) * (3 + states), ema=True, begun=size > 5) for size in (5, 4700)]
    rows.append(Row(600, (BF16, BF16, *[BF16] * states, F32), ema=True))
    table = Table(rows, [group], rule)
    table.check_step()
    table.check_step()


@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_found_inf_leaves_averages_alone(rule: str) -> None:
    rows = [Row(200, AVERAGED["f32"], ema=True)]
    Table(rows, [RULES["lamb"][1]], rule, found_inf=torch.ones(1, device=DEVICE)).check_step(skipped=(0,))


def test_only_empty_tensors() -> None:
    Table([Row(0, KINDS["f32"])]).check_step()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_eps_zero_makes_no_trouble_past_the_end() -> None:
    """NumPy warns about 0 / 0. In the interpreter this test fails if a lane past the end divides by zero."""
    row = Row(5, KINDS["f32 amsgrad"])
    for state in row.views[2:]:
        state.zero_()
    Table([row], [Group(eps=0.0)]).check_step()
    assert row.views[0].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_propagate() -> None:
    row = Row(8, KINDS["f32 amsgrad"])
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq = row.views
    grad[0], grad[1], max_exp_avg_sq[2], exp_avg_sq[3] = math.nan, math.inf, math.nan, math.inf
    param[4] = math.inf
    before = param[5:].clone()
    Table([row]).launch()
    assert param[:3].isnan().all() and max_exp_avg_sq[:1].isnan() and max_exp_avg_sq[2].isnan()
    assert exp_avg[1] == math.inf and exp_avg_sq[1] == math.inf and exp_avg_sq[3] == math.inf
    # Without weight decay an infinite param must not affect the gradient: 0 * inf would put NaN into the states.
    assert param[4] == math.inf and row.views[2][4].isfinite() and exp_avg_sq[4].isfinite()
    assert param[5:].isfinite().all() and not torch.equal(param[5:], before)


RULES = {
    "sgd": ("sgd", Group(), 0),
    "sgd momentum": ("sgd", Group(option_a=0.3, option_b=0.0, weight_decay=0.1), 1),
    "sgd nesterov": ("sgd", Group(option_a=0.0, option_b=1.0, decoupled=True, weight_decay=0.1), 1),
    "qhadam": ("qhadam", Group(option_a=0.7, option_b=0.9, maximize=True, weight_decay=0.1), 2),
    "nadam": ("qhadam", Group(option_a=0.9, option_b=1.0, decoupled=True, weight_decay=0.1), 2),
    "lion": ("lion", Group(beta1=0.875, beta2=0.99, decoupled=True, weight_decay=0.1), 1),
    "lamb": ("lamb", Group(option_a=1.0, option_b=1.0, eps=1e-6, decoupled=True, weight_decay=0.1), 2),
    "lamb l2": ("lamb", Group(option_a=0.0, option_b=0.0, eps=1e-6, maximize=True, weight_decay=0.1), 2),
}


@pytest.mark.parametrize("name", RULES)
def test_options_of_rules(name: str) -> None:
    rule, group, states = RULES[name]
    table = Table(rows_of(states, (0, 5, 5000)), [group], rule)
    table.check_step()
    table.check_step()


@for_every_rule
def test_rules(case: Case) -> None:
    signed = len(case.states) - sum(state in case.ours.rule.squares for state in case.states)
    rows = rows_of(len(case.states), (5, 4097), signed=signed)
    table = Table(rows, [Group.of(case)], case.ours.rule.name)
    for row in rows:  # a rule whose first step differs expects states of 0 there
        row.step.fill_(case.ours.rule.first_decay - 1)
    table.check_step()
    table.check_step()


@pytest.mark.parametrize("rule", ["sgd", "lamb"])
def test_misaligned_views_of_other_rules(rule: str) -> None:
    group, states = (Group(option_a=0.0, option_b=0.0), 1) if rule == "sgd" else (RULES["lamb"][1], 2)
    rows = [Row(1100, (BF16,) * (2 + states), seed=i, offsets=[0] * i + [1]) for i in range(2 + states)]
    Table(rows, [group], rule).check_step()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_lion_stands_still_at_zero_and_nan() -> None:
    row = Row(3, (F32,) * 3)
    param, grad, exp_avg = row.views
    grad[:2], exp_avg[:2], grad[2] = 0.0, 0.0, math.nan
    before = param.clone()
    Table([row], rule="lion").launch()
    assert torch.equal(param, before) and exp_avg[2].isnan()


@pytest.mark.parametrize(
    "group",
    [
        Group(weight_decay=0.3, decoupled=True, lr_reference=0.05),
        Group(weight_decay=0.3, decoupled=True, lr_reference=0.05, decay_period=390.0),
        Group(weight_decay=0.3, decoupled=True, lr_reference=0.0),
        Group(weight_decay=0.3, decoupled=True, lr=0.0, lr_reference=0.0, decay_period=390.0),
    ],
    ids=str,
)
def test_fully_decoupled_decay(group: Group) -> None:
    row = Row(100, KINDS["f32"])
    before = row.views[0].clone()
    Table([row], [group]).check_step()
    assert torch.equal(row.views[0], before) == (group.lr == 0.0)
