"""Tests of the interpreter itself: the results of instructions, control flow, and what it must reject."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from ptx.instructions import UnknownInstruction
from ptx.kernel import entries, parse
from ptx.lanes import Lanes
from ptx.machine import Program
from ptx.memory import AccessError, Memory
from ptx.toolchain import missing

pytestmark = [pytest.mark.codegen, pytest.mark.skipif(missing("gcc") is not None, reason=str(missing("gcc")))]

F32, F64, I32, I64, F16 = torch.float32, torch.float64, torch.int32, torch.int64, torch.float16

# Thread i loads element i of up to three arrays into a, b, c, and stores d.
MODULE = """
.version 8.0
.target sm_90
.visible .entry test(
    .param .u64 .ptr .global .align 16 test_a, .param .u64 test_b, .param .u64 test_c, .param .u64 test_d)
.reqntid 64
{{
    .reg .pred %p<4>;
    .reg .b16 %rs<4>;
    .reg .b32 %r<12>;
    .reg .b64 %rd<12>;
    .reg .b{bits} %a, %b, %c;
    .reg .b{out} %d;
    .shared .align 8 .b8 shared[512];
    mov.u32 %r0, %tid.x;   // a comment; with a semicolon
    ld.param.u64 %rd0, [test_a];
    ld.param.u64 %rd1, [test_b];
    ld.param.u64 %rd2, [test_c];
    ld.param.u64 %rd3, [test_d];
    mad.wide.u32 %rd4, %r0, {size}, %rd0;
    mad.wide.u32 %rd5, %r0, {size}, %rd1;
    mad.wide.u32 %rd6, %r0, {size}, %rd2;
    mad.wide.u32 %rd7, %r0, {out_size}, %rd3;
    ld.global.b{bits} %a, [%rd4];
    ld.global.b{bits} %b, [%rd5+0];
    ld.global.b{bits} %c, [ %rd6 + 0 ];
    {code}
    st.global.b{out} [%rd7], %d;
    ret;
}}
"""
LANES = 64


def parameters(*addresses: int) -> bytes:
    return struct.pack("<4Q", *addresses)


def run(code: str, arrays: list[Tensor], out: torch.dtype) -> Tensor:
    arrays = [array.repeat(LANES // array.numel()) for array in arrays]
    arrays += [arrays[0]] * (3 - len(arrays))
    result = torch.zeros(LANES, dtype=out)
    sizes = {"size": arrays[0].itemsize, "out_size": result.itemsize}
    text = MODULE.format(code=code, bits=8 * arrays[0].itemsize, out=8 * result.itemsize, **sizes)
    addresses = parameters(*(array.data_ptr() for array in (*arrays, result)))
    Program(parse(text, "test")).launch(1, LANES, 0, addresses, Memory())
    return result


def floats(*values: float, dtype: torch.dtype = F32) -> Tensor:
    return torch.tensor([*values, *[1.0] * (-len(values) % 4)], dtype=dtype)


X, Y, Z = floats(1.5, -0.1, math.nan, 3e38), floats(0.3, 7.0, 2.0, 3e38), floats(-0.45, 1e-3, 0.0, -math.inf)
K, J = torch.tensor([7, -3, 2**31 - 1, -(2**31)], dtype=I32), torch.tensor([3, 5, 2, 31], dtype=I32)
WIDE = torch.tensor([7, -3, 2**62 + 5, -(2**63)], dtype=I64)


def fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """In float64 the product of two float32 numbers is exact. With these operands the rounding of the sum to float64
    does not change the result."""
    return (x.double() * y.double() + z.double()).float()


@pytest.mark.parametrize(
    ("code", "arrays", "expected"),
    [
        ("add.rn.f32 %d, %a, %b;", [X, Y], X + Y),
        ("sub.rn.f32 %d, %a, %b;", [X, Y], X - Y),
        ("mul.rn.f32 %d, %a, %b;", [X, Y], X * Y),
        ("div.rn.f32 %d, %a, %b;", [X, Y], X / Y),
        ("sqrt.rn.f32 %d, %b;", [X, Y], Y.sqrt()),
        ("fma.rn.f32 %d, %a, %b, %c;", [X, Y, Z], fused(X, Y, Z)),
        ("fma.rn.f32 %d, %a, %a, 0fBF800000;", [X], fused(X, X, torch.tensor(-1.0))),
        ("min.f32 %d, %a, %b;", [X, Y], torch.fmin(X, Y)),
        ("max.NaN.f32 %d, %a, %b;", [X, Y], torch.maximum(X, Y)),
        ("abs.f32 %d, %a;", [X], X.abs()),
        ("abs.ftz.f32 %d, %a;", [floats(-1.5, -1e-39, 1e-39, math.nan)], floats(1.5, 0.0, 0.0, math.nan)),
        ("neg.f32 %d, %a;", [X], -X),
        ("neg.f16 %d, %a;", [Y.half()], -Y.half()),
        ("neg.bf16 %d, %a;", [Y.bfloat16()], -Y.bfloat16()),
        ("add.rn.f64 %d, %a, 0d3FF8000000000000;", [X.double()], X.double() + 1.5),
        ("rcp.rn.f64 %d, %b;", [X.double(), Y.double()], 1 / Y.double()),
        (
            "rcp.approx.ftz.f64 %d, %a;",
            [floats(4.0, -0.5, 3.0, 0.1, dtype=F64)],
            floats(0.25, -2.0, 0x155555 / 2**22, 10.0, dtype=F64),
        ),
        ("add.s32 %d, %a, -5;", [K], K - 5),
        ("sub.s32 %d, %a, %b;", [K, J], K - J),
        ("mul.lo.s32 %d, %a, %b;", [K, J], K * J),
        ("mul.wide.s32 %d, %a, %b;", [K, J], K.long() * J.long()),
        ("mad.lo.s32 %d, %a, %b, 9;", [K, J], K * J + 9),
        ("min.s32 %d, %a, %b;", [K, J], torch.minimum(K, J)),
        ("max.s64 %d, %a, 3;", [WIDE], WIDE.clamp(min=3)),
        ("neg.s32 %d, %a;", [K], -K),
        ("shl.b32 %d, %a, 4;", [K], K << 4),
        ("shl.b32 %d, %a, 32;", [K], K * 0),
        ("shr.s32 %d, %a, %b;", [K, J], K >> J),
        ("shr.s32 %d, %a, 40;", [K], K >> 31),
        ("shr.u32 %d, %a, 28;", [K], (K >> 28) & 15),
        ("shr.u64 %d, %a, 60;", [WIDE], (WIDE >> 60) & 15),
        ("bfe.u32 %d, %a, 1, 7;", [K], (K >> 1) & 127),
        ("bfe.u64 %d, %a, 1, 7;", [WIDE], (WIDE >> 1) & 127),
        ("and.b32 %d, %a, 0xFF;", [K], K & 255),
        ("or.b32 %d, %a, %b;", [K, J], K | J),
        ("xor.b32 %d, %a, %b;", [K, J], K ^ J),
        ("not.b32 %d, %a;", [K], ~K),
        ("lop3.b32 %d, %a, %b, 12, 0xe2;", [K, J], (K & J) | (12 & ~J)),
        ("prmt.b32 %d, %a, %b, 0x4521;", [K, J], (K >> 8) & 0xFFFF | (J & 0xFF00) << 8 | J << 24),
        ("cvt.rn.f64.s32 %d, %a;", [K], K.double()),
        ("cvt.rn.f32.s32 %d, %a;", [K], K.float()),
        ("cvt.rzi.s32.f32 %d, %a;", [X], torch.tensor([1, 0, 0, 2**31 - 1], dtype=I32)),
        ("cvt.rn.f32.f64 %d, %a;", [X.double() / 3], (X.double() / 3).float()),
        ("cvt.f64.f32 %d, %a;", [X], X.double()),
        ("cvt.rn.f16.f32 %d, %a;", [Y / 3], (Y / 3).half()),
        ("cvt.f32.f16 %d, %a;", [Y.half()], Y.half().float()),
        ("cvt.rn.bf16.f32 %d, %a;", [Y / 3], (Y / 3).bfloat16()),
        ("cvt.f32.bf16 %d, %a;", [Y.bfloat16()], Y.bfloat16().float()),
        ("cvt.s64.s32 %d, %a;", [K], K.long()),
        ("cvt.s32.s16 %d, %a;", [K], K.short().int()),  # of a wider register
        ("cvt.u64.u32 %d, %a;", [K], K.long() & 0xFFFFFFFF),
        ("cvt.u32.u64 %d, %a;", [WIDE], WIDE.int()),
        ("setp.lt.f32 %p0, %a, %b; selp.f32 %d, %a, %b, %p0;", [X, Y], torch.where(X < Y, X, Y)),
        ("setp.ltu.f32 %p0, %a, %b; selp.f32 %d, %a, %b, %p0;", [X, Y], torch.where(X >= Y, Y, X)),
        ("setp.nan.f32 %p0, %a, %a; selp.b32 %d, 1, 0, %p0;", [X], X.isnan().int()),
        ("setp.gt.u32 %p0, %a, 8; selp.b32 %d, 1, 0, %p0;", [K], ((K > 8) | (K < 0)).int()),
        (
            "setp.gt.s32 %p0, %a, 0; setp.lt.and.s32 %p1, %b, 5, %p0; selp.b32 %d, 1, 0, %p1;",
            [K, J],
            ((K > 0) & (J < 5)).int(),
        ),
        ("setp.gt.s32 %p0, %a, 0; not.pred %p1, %p0; mov.b32 %d, 1; @!%p1 mov.b32 %d, 2;", [K], 1 + (K > 0).int()),
        ("mov.b32 {%rs0, %rs1}, %a; mov.b32 %d, {%rs1, %rs0};", [K], (K >> 16) & 0xFFFF | K << 16),
        ("mov.b64 {%r1, %r2}, %a; mov.b64 %d, {%r1, %r1};", [WIDE], WIDE & 0xFFFFFFFF | WIDE << 32),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_computes(code: str, arrays: list[Tensor], expected: Tensor) -> None:
    found = run(code, arrays, expected.dtype)
    torch.testing.assert_close(found, expected.repeat(LANES // expected.numel()), rtol=0, atol=0, equal_nan=True)


def test_pairs_of_narrow_floats() -> None:
    found = run("cvt.rn.bf16x2.f32 %d, %a, %b;", [X, Y], I32).view(torch.bfloat16).reshape(-1, 2)
    assert torch.equal(found[:, 1].nan_to_num(), X.repeat(16).bfloat16().nan_to_num())
    assert torch.equal(found[:, 0], Y.repeat(16).bfloat16())


def test_branches_loops_and_divergence() -> None:
    """Each lane runs a different number of loop rounds. Odd and even lanes take different branches."""
    code = """
    mov.b32 %d, 0; mov.b32 %r1, 0; and.b32 %r2, %r0, 1; setp.eq.s32 %p1, %r2, 0;
    $again:
    setp.ge.s32 %p0, %r1, %r0; @%p0 bra $done;
    @%p1 bra $even;
    add.s32 %d, %d, 100; bra.uni $next;
    $even:
    add.s32 %d, %d, 1;
    $next:
    add.s32 %r1, %r1, 1; bra $again;
    $done:
    """
    found = run(code, [K], I32)
    assert found.tolist() == [lane * (100 if lane % 2 else 1) for lane in range(LANES)]


def test_indexed_branches() -> None:
    code = """
    and.b32 %r1, %r0, 1; mov.b32 %d, 5;
    table: .branchtargets zero, one;
    brx.idx %r1, table;
    one: mov.b32 %d, 11; bra.uni end;
    zero: mov.b32 %d, 10;
    end:
    """
    assert run(code, [K], I32).tolist() == [10, 11] * (LANES // 2)


def test_shared_memory_and_barriers() -> None:
    """The lower half skips the store and waits at the barrier for the upper half, whose store it reads."""
    code = """
    mov.b32 %r1, shared; shl.b32 %r2, %r0, 2; add.s32 %r1, %r1, %r2;
    setp.lt.s32 %p0, %r0, 32; @%p0 bra $lower;
    st.shared.b32 [%r1], %a;
    $lower:
    bar.sync 0;
    ld.shared.b32 %d, [shared+128];
    """
    assert run(code, [torch.arange(LANES, dtype=I32)], I32).tolist() == [32] * LANES


def test_shuffle() -> None:
    found = run("shfl.sync.bfly.b32 %d, %a, 4, 31, -1;", [torch.arange(LANES, dtype=I32)], I32)
    assert found.tolist() == [lane ^ 4 for lane in range(LANES)]


def test_vectors() -> None:
    code = """
    mad.wide.u32 %rd8, %r0, 12, %rd4; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8];
    add.s32 %d, %r1, %r4;
    """
    values = torch.arange(4 * LANES, dtype=I32)
    text = MODULE.format(code=code, bits=32, out=32, size=4, out_size=4)
    result, memory = torch.zeros(LANES, dtype=I32), Memory()
    addresses = parameters(*[values.data_ptr()] * 3, result.data_ptr())
    Program(parse(text, "test")).launch(1, LANES, 0, addresses, memory)
    assert result.tolist() == [8 * lane + 3 for lane in range(LANES)]
    assert memory.accesses == {("ld", 16): LANES, ("ld", 4): 3 * LANES, ("st", 4): LANES}


@pytest.mark.parametrize(
    "code",
    [
        "div.full.f32 %d, %a, %b;",
        "sqrt.approx.f32 %d, %a;",
        "add.ftz.f32 %d, %a, %b;",
        "add.f32 %d, %a, %b;",
        "fma.rn.ftz.f32 %d, %a, %b, %c;",
        "ex2.approx.f32 %d, %a;",
        "atom.global.add.f32 %d, [%rd4], %a;",
        "red.global.add.f32 [%rd4], %a;",
        "ld.global.nc.f32 %d, [%rd4];",
        "ld.volatile.global.f32 %d, [%rd4];",
        "st.local.f32 [%rd4], %d;",
        "cvt.rz.f32.f64 %d, %a;",
        "setp.foo.s32 %p0, %a, %b;",
        "call.uni helper;",
        "bar.warp.sync 0;",
    ],
)
def test_unknown_instructions_are_named(code: str) -> None:
    text = MODULE.format(code=code, bits=32, out=32, size=4, out_size=4)
    with pytest.raises(UnknownInstruction) as raised:
        Program(parse(text, "test"))
    assert code.rstrip(";") in str(raised.value)


@pytest.mark.parametrize(
    ("offset", "code", "match"),
    [
        (0, "ld.global.b32 %d, [%rd4+256];", "outside of every tensor: ld.global.b32"),
        (0, "ld.global.b32 %d, [%rd4+-4];", "outside of every tensor"),
        (0, "mov.b64 %rd8, 0; ld.global.b32 %d, [%rd8];", "outside of every tensor"),
        (0, "st.global.b32 [%rd4+256], %a; mov.b32 %d, 0;", "outside of every tensor: st.global.b32"),
        (1, "ld.global.v2.b32 {%d, %r1}, [%rd4];", "misaligned: ld.global.v2.b32"),
        (0, "ld.shared.b32 %d, [shared+512];", "outside of shared memory"),
        (0, "mov.b32 %r1, 2; ld.shared.b32 %d, [%r1];", "outside of shared memory"),
    ],
)
def test_wrong_accesses_are_errors(offset: int, code: str, match: str) -> None:
    buffer = torch.zeros(LANES + offset, dtype=I32)
    while buffer.data_ptr() % 8:
        buffer = torch.zeros(LANES + offset, dtype=I32)
    result = torch.zeros(LANES, dtype=I32)
    text = MODULE.format(code=code, bits=32, out=32, size=4, out_size=4)
    addresses = parameters(*[buffer[offset:].data_ptr()] * 3, result.data_ptr())
    with pytest.raises(AccessError, match=match):
        Program(parse(text, "test")).launch(1, LANES, 0, addresses, Memory())


def test_a_tensor_that_is_gone_may_not_be_touched() -> None:
    values, result = torch.zeros(1 << 16, dtype=I32), torch.zeros(LANES, dtype=I32)
    text = MODULE.format(code="mov.b32 %d, %a;", bits=32, out=32, size=4, out_size=4)
    addresses, memory = parameters(*[values.data_ptr()] * 3, result.data_ptr()), Memory()
    program = Program(parse(text, "test"))
    program.launch(1, LANES, 0, addresses, memory)
    values.untyped_storage().resize_(0)
    memory.refresh()
    with pytest.raises(AccessError):
        program.launch(1, LANES, 0, addresses, memory)


def test_a_shuffle_of_a_part_of_a_warp_is_an_error() -> None:
    code = "setp.lt.s32 %p0, %r0, 7; @%p0 bra $over; shfl.sync.bfly.b32 %d, %a, 4, 31, -1; $over:"
    with pytest.raises(RuntimeError, match="a part of a warp"):
        run(code, [K], I32)


def test_two_barriers_at_once_are_an_error() -> None:
    code = "setp.lt.s32 %p0, %r0, 7; @%p0 bra $a; bar.sync 0; bra.uni $b; $a: bar.sync 0; $b: mov.b32 %d, 0;"
    with pytest.raises(RuntimeError, match="different barriers"):
        run(code, [K], I32)


def test_registers_of_another_width_are_an_error() -> None:
    with pytest.raises(ValueError, match="is read as"):
        run("add.s64 %d, %a, %a;", [K], I64)


def test_registers_and_shared_memory_start_as_no_number() -> None:
    kernel = parse(MODULE.format(code="", bits=32, out=32, size=4, out_size=4), "test")
    lanes = Lanes(kernel, 0, 1, LANES, 1, kernel.shared_bytes, b"", Memory())
    assert (lanes.registers["%r5"] == 0xA5A5A5A5).all() and (lanes.shared == 0xA5).all()


def test_names_of_a_module() -> None:
    text = MODULE.format(code="", bits=32, out=32, size=4, out_size=4)
    assert entries(text) == ["test"]
    with pytest.raises(KeyError, match="test"):
        parse(text, "other")
