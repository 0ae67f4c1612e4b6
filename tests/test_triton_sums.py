"""Sums of the Triton kernels: the norm of all gradients, clipping by it, and the norms for trust ratios. They run as in
test_triton_kernels.py."""

import math

import pytest
import torch
from fused_optim.triton_kernels import launch as launching
from fused_optim.triton_kernels.launch import ROW_SUMS, launch_total
from triton_tables import BF16, DEVICE, F16, F32, F64, KINDS, LAUNCHES, RUNS, Group, Row, Table, rows_of

from fused_optim.engine.layout import SHARE
from fused_optim.engine.table import count_shares

# Otherwise nothing can run a kernel, and no test is collected.
__test__ = RUNS
pytestmark = [pytest.mark.compiled, pytest.mark.backend]

# One norm over the first two groups. It exceeds the bound of the first group only.
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
    """Bit for bit. Only gradients of groups that must be clipped may change."""
    outside = [row.bytes_outside() for row in table.rows]
    before = [[view.clone() for view in row.views] for row in table.rows]
    expected = table.norm()
    table.scale_gradients()
    norm = math.sqrt(table.squares.item())
    assert norm == pytest.approx(expected, rel=1e-13)
    for row, (param, grad), around in zip(table.rows, before, outside, strict=True):
        group = table.groups[row.group_index]
        factor = min(1.0, group.max_norm / (norm + group.clip_eps)) if group.max_norm and row.grad_address else 1.0
        wide = grad if grad.dtype == F64 else grad.float()
        assert torch.equal(row.views[0], param) and torch.equal(row.views[1], (wide * factor).to(grad.dtype))
        assert all(torch.equal(kept, now) for kept, now in zip(around, row.bytes_outside(), strict=True))


def test_clipping_of_a_rule_with_trust() -> None:
    group = Group(option_a=1.0, option_b=1.0, eps=1e-6, decoupled=True, weight_decay=0.1, max_norm=1.0, clip_eps=0.0)
    Table(rows_of(2, (5, 4200)), [group], "lamb").check_step()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_clipping_by_nothing() -> None:
    """First there is no chunk, then there are only zeros: the norm is 0, and the division by it must have no effect."""
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
    """Bitwise equal, independent of the addresses of tensors and of the memory around them."""

    def sums(offset: int) -> list[float]:
        shapes = [(4600, F32), (700, BF16), (50, F64)]
        rows = [Row(size, (dtype,) * 4, offsets=(offset,) * 4) for size, dtype in shapes]
        table = Table(rows, [Group(option_a=1.0, option_b=1.0, decoupled=True, weight_decay=0.1, max_norm=1e5)], "lamb")
        table.launch()
        return [*table.squares.tolist(), *table.sums.flatten().tolist()]

    assert sums(0) == sums(1) == sums(0)


def test_sums_of_many_chunks() -> None:
    counts = [0, 1, 700, 3, 5000]
    row_offsets = torch.tensor([0, *counts]).cumsum(0).to(DEVICE)
    partials = torch.randn(sum(counts), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sums = torch.full((len(counts), 2), math.nan, dtype=torch.float64, device=DEVICE)
    with LAUNCHES.raising():
        ROW_SUMS.start(sums.device, len(counts), row_offsets, partials, sums)
    expected = torch.stack([part.sum(0) for part in partials.split(counts)])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 4096, 4097, 3 * 4096 + 7])
def test_total(count: int) -> None:
    """First sums of shares of neighbouring numbers, then the sum of these. Nothing is written beyond the space that
    `count_shares` reserves."""
    numbers = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    partials = torch.cat([numbers, torch.full((count_shares(count),), math.nan, dtype=torch.float64)]).to(DEVICE)
    out = torch.full((1,), math.nan, dtype=torch.float64, device=DEVICE)
    with LAUNCHES.raising():
        launch_total(partials, count, out)
    torch.testing.assert_close(out, numbers.sum().reshape(1).to(DEVICE), rtol=1e-12, atol=1e-12)
    assert torch.equal(partials[:count].cpu(), numbers)
    shares = numbers.split(SHARE) if count > SHARE else ()
    expected = torch.tensor([share.sum() for share in shares], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(partials[count:], expected, rtol=1e-12, atol=1e-12)


def test_levels_of_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch sums the results of the launch before it. The last one writes the total."""
    launches: list[tuple[int, ...]] = []

    class Stand:
        def start(self, device: torch.device, *args: object) -> None:
            launches.append(tuple(arg if isinstance(arg, int) else id(arg) for arg in args))

    monkeypatch.setattr(launching, "TOTAL", Stand())
    partials, out, count = torch.zeros(1), torch.zeros(1), 4096**2 + 1
    launch_total(partials, count, out)
    a, b = id(partials), id(out)
    assert launches == [
        (4097, a, a, 0, count, count),
        (2, a, a, count, 4097, count + 4097),
        (1, a, b, count + 4097, 2, 0),
    ]
    assert count_shares(count) == 4097 + 2


def test_trust_ratios() -> None:
    lamb = {"option_a": 1.0, "option_b": 1.0, "eps": 1e-6, "decoupled": True}
    groups = [
        Group(weight_decay=0.1, **lamb),
        Group(**lamb),  # without decay the ratio is 1
        Group(trust_always=True, **lamb),
        Group(weight_decay=0.1, trust_low=40.0, trust_high=50.0, **lamb),
        Group(weight_decay=0.1, trust_high=0.25, **lamb),
    ]
    rows = [Row(300, KINDS["f32"], seed=i, group=i) for i in range(5)]
    rows += [Row(300, KINDS["f32"], seed=5), Row(300, KINDS["f32"], seed=6), Row(0, KINDS["f32"])]
    rows[5].views[0].zero_()  # if a norm is 0, the ratio is 1
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
    """In float16 these squares become 0, so the update is huge. The ratio must still bound the step."""
    row = Row(500, (F16,) * 4)
    param, grad, *states = row.views
    grad.mul_(1e-4)
    for state in states:
        state.zero_()
    before = param.double()
    Table(
        [row], [Group(lr=0.1, option_a=1.0, option_b=1.0, eps=1e-6, decoupled=True, weight_decay=0.01)], "lamb"
    ).launch()
    assert not row.views[3].any()
    assert (param.double() - before).norm().item() == pytest.approx(0.1 * before.norm().item(), rel=1e-2)


def test_found_inf_skips_both_walks() -> None:
    rows = [Row(200, KINDS["f32"]), Row(4200, KINDS["bf16"])]
    rows[0].views[2].fill_(math.nan)
    group = Group(option_a=1.0, option_b=1.0, decoupled=True, weight_decay=0.1, max_norm=1.0)
    table = Table(rows, [group], "lamb", found_inf=torch.ones(1, device=DEVICE))
    table.check_step(skipped=(0, 1))
    assert table.trust.tolist() == [1.0, 1.0] and table.sums.tolist() == [[0.0, 0.0]] * 2
