"""Numbers of the Triton kernels, on tables built by hand from csrc/tables.h, against the same step in float64.

They run in Triton's interpreter (`TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py`) or on a GPU if there is one.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from fused_optim.triton_kernels.launch import SPANS, TOTAL
from triton_tables import BF16, DEVICE, F16, F32, F64, INTERPRETED, Group, Row, Table

# Elsewhere there is nothing that could run a kernel: collect nothing.
__test__ = INTERPRETED or torch.cuda.is_available()

SIZES = (0, 1, 31, 4095, 4096, 4097, 9000)
KINDS = {
    "f32": (F32, F32, F32, F32),
    "f32 amsgrad": (F32,) * 5,
    "bf16, f32 states": (BF16, BF16, F32, F32),
    "bf16": (BF16,) * 4,
    "bf16 amsgrad": (BF16,) * 5,
    "f16": (F16,) * 4,
    "f16, f32 states amsgrad": (F16, F16, F32, F32, F32),
    "f32, bf16 grad": (F32, BF16, F32, F32),
    "f64": (F64,) * 4,
    "f64 amsgrad": (F64,) * 5,
}


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
    """The last chunk of a tensor of 2**32 elements and some. The rest of it is never touched, and need not exist."""
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
        row.step += row.group % 7
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
    """`found_inf` is a sum over devices. Skipped states may be memory that nobody has written yet."""
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


def test_prep_is_exact() -> None:
    """Every column of hyper, bit for bit: float64 on the device is the float64 of Python."""

    def power(base: float, exponent: int) -> float:
        result = 1.0
        while exponent:
            result *= base if exponent & 1 else 1.0
            base *= base
            exponent >>= 1
        return result

    one_cycle = Group(lr=0.3, beta1=0.95, beta2=0.9999, weight_decay=0.1, decoupled=True, a=0.3, b=0.999)
    normalized = Group(weight_decay=0.2, decoupled=True, lr_reference=0.07, decay_period=390.0, a=1.0, b=0.0)
    groups = [one_cycle, Group(maximize=True, weight_decay=0.2, max_norm=0.01, a=0.0, b=0.0), normalized]
    steps = [1, 2, 3, 10, 999, 123457, 2**24] * 5
    rows = [Row(1, KINDS["f32"], group=i % 3, begun=i % 2 == 0) for i in range(len(steps))]
    for row, step in zip(rows, steps, strict=True):
        row.step.fill_(step - 1)
    table = Table(rows, groups, grad_scale=torch.tensor([3.0], device=DEVICE))
    table.launch()
    for number, step in enumerate(steps):
        group = groups[number % 3]
        scale, decay = 1.0 / 3.0, 0.0
        if group.max_norm:
            scale *= group.max_norm / (math.sqrt(table.squares.item()) * scale + group.clip_eps)
        if group.decoupled:
            decay = group.lr / group.lr_reference * group.weight_decay / math.sqrt(group.decay_period)
        ema_weight = 1.0 if step == 1 and not rows[number].begun else 1.0 - group.ema_decay
        expected = [group.lr, group.beta1, ema_weight, group.eps, 1.0 - group.beta1, 1.0 - group.beta2]
        correction1, correction2 = 1.0 - power(group.beta1, step), 1.0 - power(group.beta2, step)
        expected += [group.lr / correction1, 1.0 / math.sqrt(correction2), -scale if group.maximize else scale]
        expected += [0.0 if group.decoupled else group.weight_decay, decay, 0.0, float(step == 1)]
        assert table.hyper[number].tolist() == [*expected, 1.0 - group.a, 1.0 - group.b, 1.0 / correction1]


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
    """NumPy warns of 0 / 0, so in the interpreter a lane past the end that divides by zero fails this test."""
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
    # Without weight decay an infinite param says nothing about the gradient: 0 * inf must not leak NaN into the states.
    assert param[4] == math.inf and row.views[2][4].isfinite() and exp_avg_sq[4].isfinite()
    assert param[5:].isfinite().all() and not torch.equal(param[5:], before)


RULES = {
    "sgd": ("sgd", Group(), 0),
    "sgd momentum": ("sgd", Group(a=0.3, b=0.0, weight_decay=0.1), 1),
    "sgd nesterov": ("sgd", Group(a=0.0, b=1.0, decoupled=True, weight_decay=0.1), 1),
    "qhadam": ("qhadam", Group(a=0.7, b=0.9, maximize=True, weight_decay=0.1), 2),
    "nadam": ("qhadam", Group(a=0.9, b=1.0, decoupled=True, weight_decay=0.1), 2),
    "lion": ("lion", Group(beta1=0.875, beta2=0.99, decoupled=True, weight_decay=0.1), 1),
    "lamb": ("lamb", Group(a=1.0, b=1.0, eps=1e-6, decoupled=True, weight_decay=0.1), 2),
    "lamb l2": ("lamb", Group(a=0.0, b=0.0, eps=1e-6, maximize=True, weight_decay=0.1), 2),
}


def rows_of(states: int, sizes: Sequence[int], group: int = 0) -> list[Row]:
    """Those sizes in float32, a few of other kinds, and one that has been stepped before."""
    rows = [Row(size, (F32,) * (2 + states), group=group) for size in sizes]
    rows += [
        Row(600 + i, (*dtypes, *[state] * states), seed=i, group=group)
        for i, (*dtypes, state) in enumerate([(BF16, BF16, BF16), (BF16, BF16, F32), (F64, F64, F64)])
    ]
    rows[-1].step += 3
    return rows


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    rule, group, states = RULES[name]
    table = Table(rows_of(states, (0, 5, 5000)), [group], rule)
    table.check_step()
    table.check_step()


@pytest.mark.parametrize("rule", ["sgd", "lamb"])
def test_misaligned_views_of_other_rules(rule: str) -> None:
    group, states = (Group(a=0.0, b=0.0), 1) if rule == "sgd" else (RULES["lamb"][1], 2)
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


# One norm over the first two groups, which clips only one of them.
CLIPPED = [Group(max_norm=0.5), Group(max_norm=1e5, clip_eps=0.0), Group()]


def clipped_rows() -> list[Row]:
    kinds = KINDS["f32"], KINDS["bf16"], KINDS["f64"], KINDS["f16"]
    rows = [Row(size, kind, group=i % 3) for i, kind in enumerate(kinds) for size in (0, 3, 4700)]
    rows.append(Row(900, KINDS["f32"]))
    rows[-1].grad_address = 0
    return rows


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_clipping(scale: float) -> None:
    table = Table(clipped_rows(), CLIPPED, grad_scale=torch.tensor([scale], device=DEVICE))
    table.check_step(skipped=(len(table.rows) - 1,))
    assert table.squares.item() == pytest.approx(table.norm() ** 2, rel=1e-13)


@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_scaled_where_they_stand(offset: int) -> None:
    kinds = [(dtype, dtype) for dtype in (F32, BF16, F16, F64)]
    rows = [Row(size, kind, offsets=(1, offset), group=i % 3) for i, kind in enumerate(kinds) for size in (0, 3, 4700)]
    rows.append(Row(900, kinds[0]))
    rows[-1].grad_address = 0
    check_scaled(Table(rows, CLIPPED))


def test_gradients_scaled_beyond_32_bits() -> None:
    check_scaled(Table([Row(1030, (dtype, dtype)) for dtype in (F32, BF16, F64)], CLIPPED, chunks_before=2**20))


def check_scaled(table: Table) -> None:
    """To the bit, and nothing but gradients of groups that have to be clipped."""
    outside = [row.bytes_outside() for row in table.rows]
    before = [[view.clone() for view in row.views] for row in table.rows]
    expected = table.norm()
    table.scale_gradients()
    norm = math.sqrt(table.squares.item())
    assert norm == pytest.approx(expected, rel=1e-13)
    for row, (param, grad), around in zip(table.rows, before, outside, strict=True):
        group = table.groups[row.group]
        factor = min(1.0, group.max_norm / (norm + group.clip_eps)) if group.max_norm and row.grad_address else 1.0
        wide = grad if grad.dtype == F64 else grad.float()
        assert torch.equal(row.views[0], param) and torch.equal(row.views[1], (wide * factor).to(grad.dtype))
        assert all(torch.equal(kept, now) for kept, now in zip(around, row.bytes_outside(), strict=True))


def test_clipping_of_a_rule_with_trust() -> None:
    group = Group(a=1.0, b=1.0, eps=1e-6, decoupled=True, weight_decay=0.1, max_norm=1.0, clip_eps=0.0)
    Table(rows_of(2, (5, 4200)), [group], "lamb").check_step()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_clipping_by_nothing() -> None:
    """No chunk, then only zeros: the norm is 0, and nothing comes of dividing by it."""
    groups = [Group(max_norm=1.0, clip_eps=0.0)]
    table = Table([Row(0, KINDS["f32"])], groups)
    table.check_step()
    assert table.squares.item() == 0.0
    row = Row(40, KINDS["f32"])
    row.views[1].zero_()
    Table([row], groups).check_step()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_norm_of_nan_goes_into_what_is_clipped() -> None:
    rows = [Row(20, KINDS["f32"], group=i) for i in range(3)]
    rows[1].views[1][7] = math.nan
    Table(rows, CLIPPED).launch()
    assert rows[0].views[0].isnan().all() and rows[1].views[0].isnan().all() and rows[2].views[0].isfinite().all()


def test_sums_depend_on_nothing_but_values() -> None:
    """To the last bit: neither on where tensors lie nor on what lies around them."""

    def sums(offset: int) -> list[float]:
        shapes = [(4600, F32), (700, BF16), (50, F64)]
        rows = [Row(size, (dtype,) * 4, offsets=(offset,) * 4) for size, dtype in shapes]
        table = Table(rows, [Group(a=1.0, b=1.0, decoupled=True, weight_decay=0.1, max_norm=1e5)], "lamb")
        table.launch()
        return [*table.squares.tolist(), *table.sums.flatten().tolist()]

    assert sums(0) == sums(1) == sums(0)


def test_sums_of_many_chunks() -> None:
    counts = [0, 1, 700, 3, 5000]
    spans = torch.tensor([0, *counts]).cumsum(0).to(DEVICE)
    partials = torch.randn(sum(counts), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sums = torch.full((len(counts), 2), math.nan, dtype=torch.float64, device=DEVICE)
    SPANS.start(sums.device, len(counts), spans, partials, sums)
    expected = torch.stack([part.sum(0) for part in partials.split(counts)])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    out = torch.full((1,), math.nan, dtype=torch.float64, device=DEVICE)
    TOTAL.start(sums.device, 1, partials, out, partials.numel())
    torch.testing.assert_close(out, partials.sum().reshape(1), rtol=1e-12, atol=1e-12)


def test_trust_ratios() -> None:
    lamb = {"a": 1.0, "b": 1.0, "eps": 1e-6, "decoupled": True}
    groups = [
        Group(weight_decay=0.1, **lamb),
        Group(**lamb),  # no decay: no ratio
        Group(trust_always=True, **lamb),
        Group(weight_decay=0.1, trust_low=40.0, trust_high=50.0, **lamb),
        Group(weight_decay=0.1, trust_high=0.25, **lamb),
    ]
    rows = [Row(300, KINDS["f32"], seed=i, group=i) for i in range(5)]
    rows += [Row(300, KINDS["f32"], seed=5), Row(300, KINDS["f32"], seed=6), Row(0, KINDS["f32"])]
    rows[5].views[0].zero_()  # neither norm is 0, or the ratio is 1
    for view in rows[6].views:
        view.zero_()
    rows.append(Row(300, KINDS["f32"], seed=8))
    rows[8].grad_address = 0
    table = Table(rows, groups, "lamb")
    table.trust[8] = 7.0
    table.check_step(skipped=(8,))
    trust, sums = table.trust.tolist(), table.sums.tolist()
    ratios = [math.sqrt(param / update) if param and update else 1.0 for param, update in sums[:5]]
    assert trust == pytest.approx([ratios[0], 1.0, ratios[2], 40.0, 0.25, 1.0, 1.0, 1.0, 7.0], rel=1e-14)
    assert 0.3 < ratios[0] < 30.0 and sums[5][0] == 0.0 < sums[5][1]
    assert sums[6:] == [[0.0, 0.0]] * 3


def test_norms_are_of_the_states_as_they_are_stored() -> None:
    """In float16 these squares become 0 and the update huge; the ratio must bound the step all the same."""
    row = Row(500, (F16,) * 4)
    param, grad, *states = row.views
    grad.mul_(1e-4)
    for state in states:
        state.zero_()
    before = param.double()
    Table([row], [Group(lr=0.1, a=1.0, b=1.0, eps=1e-6, decoupled=True, weight_decay=0.01)], "lamb").launch()
    assert not row.views[3].any()
    assert (param.double() - before).norm().item() == pytest.approx(0.1 * before.norm().item(), rel=1e-2)


def test_found_inf_skips_both_walks() -> None:
    rows = [Row(200, KINDS["f32"]), Row(4200, KINDS["bf16"])]
    rows[0].views[2].fill_(math.nan)
    group = Group(a=1.0, b=1.0, decoupled=True, weight_decay=0.1, max_norm=1.0)
    table = Table(rows, [group], "lamb", found_inf=torch.ones(1, device=DEVICE))
    table.check_step(skipped=(0, 1))
    assert table.trust.tolist() == [1.0, 1.0] and table.sums.tolist() == [[0.0, 0.0]] * 2
