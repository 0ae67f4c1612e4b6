"""Stream formats: each language's functions against the definition in format_oracle.py, to the bit."""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import format_oracle as oracle
import numpy as np
import pytest
import torch
from commands import ROOT, run
from torch import Tensor
from triton_tables import DEVICE, RUNS

from fused_optim.engine import formats

Array = Any
NEAREST = 0x80000000
GENERATOR = np.random.default_rng(0)

CPP = f"""#include "{ROOT}/csrc/formats.h"
#include <cstdio>
using namespace fused_optim;
#define EACH for (int64_t i = 0; i < n; ++i)
extern "C" {{
void threshold(uint32_t* out, const uint32_t* index, uint32_t step, int which, int64_t n) {{
  const Dither dither = which == 0 ? kDitherSquare : which == 1 ? kDitherAverage : kDitherParam;
  EACH out[i] = fused_optim::threshold(dither, index[i], step);
}}
void bf16(uint16_t* out, const float* x, const uint32_t* at, int64_t n) {{ EACH out[i] = encode_bf16(x[i], at[i]); }}
void upper(uint16_t* out, const float* x, int64_t n) {{ EACH out[i] = upper_half(x[i]); }}
void lower(int16_t* out, const float* x, int64_t n) {{ EACH out[i] = lower_half(x[i]); }}
void quarter(int8_t* out, const float* x, const uint32_t* at, int64_t n) {{ EACH out[i] = lower_quarter(x[i], at[i]); }}
void join(float* out, const uint16_t* a, const int16_t* b, int64_t n) {{ EACH out[i] = join_halves(a[i], b[i]); }}
void join8(float* out, const uint16_t* a, const int8_t* b, int64_t n) {{ EACH out[i] = join_quarter(a[i], b[i]); }}
void e8m8(uint16_t* out, const float* x, const uint32_t* at, int64_t n) {{ EACH out[i] = encode_e8m8(x[i], at[i]); }}
void from_e8m8(float* out, const uint16_t* x, int64_t n) {{ EACH out[i] = decode_e8m8(x[i]); }}
void anchored8(uint8_t* out, const float* x, const float* square, const uint32_t* at, int k, int64_t n) {{
  EACH out[i] = encode_anchored8(x[i], square[i], k, at[i]);
}}
void from_anchored8(float* out, const uint8_t* x, const float* square, int k, int64_t n) {{
  EACH out[i] = decode_anchored8(x[i], square[i], k);
}}
// How many of all float32 numbers do not come back bit for bit; NaN must only stay NaN.
int64_t lost() {{
  int64_t lost = 0;
  for (uint64_t bits = 0; bits < (uint64_t{{1}} << 32); ++bits) {{
    const float x = bits_float(static_cast<uint32_t>(bits)), back = join_halves(upper_half(x), lower_half(x));
    const bool nan = (bits & 0x7fffffff) > 0x7f800000, back_nan = (float_bits(back) & 0x7fffffff) > 0x7f800000;
    lost += nan ? !back_nan : float_bits(back) != bits;
  }}
  return lost;
}}
}}
"""


class Implementation:
    """The functions of one language, on numpy arrays: values are float32, codes, halves and thresholds int64."""

    def threshold(self, kind: str, index: Array, step: int) -> Array:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Callable[..., Array]:
        raise NotImplementedError(name)


class Cpp(Implementation):
    def __init__(self, folder: Path) -> None:
        source, library = folder / "formats.cpp", folder / "formats.so"
        source.write_text(CPP)
        # The flags of the CPU walker: the vectorised loops are what must be right.
        flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC", "-shared"]
        run(["g++", "-std=c++17", *flags, str(source), "-o", str(library)])
        self.code = ctypes.CDLL(str(library))
        self.code.lost.restype = ctypes.c_int64

    def call(self, name: str, dtype: Any, *args: Array | int) -> Array:
        count = next(len(a) for a in args if not isinstance(a, int))
        out = np.zeros(count, dtype)
        pointers = [a if isinstance(a, int) else np.ascontiguousarray(a).ctypes.data_as(ctypes.c_void_p) for a in args]
        getattr(self.code, name)(out.ctypes.data_as(ctypes.c_void_p), *pointers, ctypes.c_int64(count))
        return out if dtype is np.float32 else out.astype(np.int64)

    def threshold(self, kind: str, index: Array, step: int) -> Array:
        which = list(oracle.SEQUENCES).index(kind)
        return self.call("threshold", np.uint32, index.astype(np.uint32), step, which)

    def bf16(self, x: Array, at: Array) -> Array:
        return self.call("bf16", np.uint16, x, at.astype(np.uint32))

    def halves(self, x: Array) -> tuple[Array, Array]:
        return self.call("upper", np.uint16, x), self.call("lower", np.int16, x)

    def quarter(self, x: Array, at: Array) -> Array:
        return self.call("quarter", np.int8, x, at.astype(np.uint32))

    def joined(self, upper: Array, lower: Array, unit: int = 1) -> Array:
        if unit == 1:
            return self.call("join", np.float32, upper.astype(np.uint16), lower.astype(np.int16))
        return self.call("join8", np.float32, upper.astype(np.uint16), lower.astype(np.int8))

    def e8m8(self, x: Array, at: Array) -> Array:
        return self.call("e8m8", np.uint16, x, at.astype(np.uint32))

    def from_e8m8(self, code: Array) -> Array:
        return self.call("from_e8m8", np.float32, code.astype(np.uint16))

    def anchored8(self, x: Array, square: Array, exponent: int, at: Array) -> Array:
        return self.call("anchored8", np.uint8, x, square, at.astype(np.uint32), exponent)

    def from_anchored8(self, code: Array, square: Array, exponent: int) -> Array:
        return self.call("from_anchored8", np.float32, code.astype(np.uint8), square, exponent)


def codes(tensor: Tensor) -> Array:
    """The bits of codes as integers that are not negative."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
        return tensor.long().numpy() & 0xFFFF
    return tensor.long().numpy()


class Torch(Implementation):
    def threshold(self, kind: str, index: Array, step: int) -> Array:
        return formats.thresholds(getattr(formats, f"DITHER_{kind.upper()}"), torch.tensor(index), step).numpy()

    def bf16(self, x: Array, at: Array) -> Array:
        return codes(formats.encode_bf16(torch.tensor(x), torch.tensor(at)))

    def halves(self, x: Array) -> tuple[Array, Array]:
        upper, lower = formats.split(torch.tensor(x))
        return codes(upper), codes(lower)

    def quarter(self, x: Array, at: Array) -> Array:
        return codes(formats.lower_quarter(torch.tensor(x), torch.tensor(at)))

    def joined(self, upper: Array, lower: Array, unit: int = 1) -> Array:
        param = torch.tensor(upper.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
        return formats.join(param, torch.tensor(lower).to(torch.int16 if unit == 1 else torch.int8)).numpy()

    def e8m8(self, x: Array, at: Array) -> Array:
        return codes(formats.encode_e8m8(torch.tensor(x), torch.tensor(at)))

    def from_e8m8(self, code: Array) -> Array:
        return formats.decode_e8m8(torch.tensor(code).to(torch.uint16)).numpy()

    def anchored8(self, x: Array, square: Array, exponent: int, at: Array) -> Array:
        return codes(formats.encode_anchored8(torch.tensor(x), torch.tensor(square), exponent, torch.tensor(at)))

    def from_anchored8(self, code: Array, square: Array, exponent: int) -> Array:
        return formats.decode_anchored8(torch.tensor(code).to(torch.uint8), torch.tensor(square), exponent).numpy()


class Triton(Implementation):
    """All functions by one kernel, over int32 and float32 arrays."""

    def run(self, name: str, x: Array, a: Array, b: Array | float = 0.0, k: int = 0) -> Array:
        from triton_formats import launch

        def words(array: Array) -> Tensor:
            array = np.broadcast_to(array, np.shape(x))
            raw = array.view(np.int32) if array.dtype == np.float32 else array.astype(np.uint32).view(np.int32)
            return torch.tensor(raw, device=DEVICE)

        return launch(name, words(x), words(a), words(np.float32(b) if np.isscalar(b) else b), k).cpu().numpy()

    def integers(self, name: str, x: Array, a: Array, b: Array | float = 0.0, k: int = 0) -> Array:
        return self.run(name, x, a, b, k).astype(np.int64)

    def threshold(self, kind: str, index: Array, step: int) -> Array:
        return self.integers(f"threshold_{kind}", index, np.full(len(index), step)) % 2**32

    def bf16(self, x: Array, at: Array) -> Array:
        return self.integers("bf16", x, at)

    def halves(self, x: Array) -> tuple[Array, Array]:
        zero = np.zeros(len(x), np.int64)
        return self.integers("upper", x, zero), self.integers("lower", x, zero)

    def quarter(self, x: Array, at: Array) -> Array:
        return self.integers("quarter", x, at)

    def joined(self, upper: Array, lower: Array, unit: int = 1) -> Array:
        return self.run("join" if unit == 1 else "join8", upper, lower).view(np.float32)

    def e8m8(self, x: Array, at: Array) -> Array:
        return self.integers("e8m8", x, at)

    def from_e8m8(self, code: Array) -> Array:
        return self.run("from_e8m8", code, np.zeros(len(code), np.int64)).view(np.float32)

    def anchored8(self, x: Array, square: Array, exponent: int, at: Array) -> Array:
        return self.integers("anchored8", x, at, square, exponent)

    def from_anchored8(self, code: Array, square: Array, exponent: int) -> Array:
        return self.run("from_anchored8", code, np.zeros(len(code), np.int64), square, exponent).view(np.float32)


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_triton = pytest.mark.skipif(not RUNS, reason="Triton needs a GPU or TRITON_INTERPRET=1")


@pytest.fixture(
    params=["torch", pytest.param("cpp", marks=needs_gxx), pytest.param("triton", marks=needs_triton)], scope="module"
)
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Implementation]:
    if request.param == "cpp":
        yield Cpp(tmp_path_factory.mktemp("formats"))
    else:
        yield {"torch": Torch, "triton": Triton}[request.param]()


def samples() -> Array:
    """float32: every upper half with lower halves at the ends and around the middle; NaN, infinity and denormals are
    among them."""
    upper = np.arange(2**16, dtype=np.int64)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return oracle.floats((upper + lower).reshape(-1))


def some_thresholds(count: int) -> list[Array]:
    return [np.full(count, NEAREST), np.full(count, 0), np.full(count, 2**32 - 1), GENERATOR.integers(0, 2**32, count)]


def assert_same(found: Array, wanted: Array) -> None:
    """Bits of values, or codes. Of NaN only that it is one."""
    if np.asarray(wanted).dtype == np.float32:
        assert np.array_equal(np.isnan(found), np.isnan(wanted))
        number = ~np.isnan(wanted)
        found, wanted = oracle.bits(found)[number], oracle.bits(wanted)[number]
    assert np.array_equal(found, wanted), np.flatnonzero(found != wanted)[:10]


@pytest.mark.parametrize("kind", oracle.SEQUENCES)
def test_thresholds(ours: Implementation, kind: str) -> None:
    index = np.concatenate([np.arange(1000), GENERATOR.integers(0, 2**40, 1000)])
    for step in (1, 2, 1000003):
        assert_same(ours.threshold(kind, index, step), oracle.threshold(kind, index, step))


@pytest.mark.slow
def test_encoding_and_decoding_follow_the_definition(ours: Implementation) -> None:
    x = samples()
    for at in some_thresholds(len(x)):
        assert_same(ours.bf16(x, at), oracle.bf16(x, at))
        assert_same(ours.e8m8(x, at), oracle.e8m8(x, at))
        assert_same(ours.quarter(x, at), oracle.quarter(x, at))
    upper, lower = ours.halves(x)
    assert_same(upper, oracle.halves(x)[0])
    assert_same(lower, oracle.halves(x)[1])
    assert_same(ours.joined(upper, lower), x)
    quarter = oracle.quarter(x, GENERATOR.integers(0, 2**32, len(x)))
    assert_same(ours.joined(upper, quarter, 256), oracle.joined(upper, quarter, 256))
    code = np.arange(2**16)
    assert_same(ours.from_e8m8(code), oracle.from_e8m8(code))


@pytest.mark.parametrize("exponent", [-6, -4, -2, 0])
def test_anchored8_follows_the_definition(ours: Implementation, exponent: int) -> None:
    """Every exponent of the anchor's square, and values from far below to far above it."""
    square = np.repeat(oracle.floats(np.arange(0, 0x7F800000, 0x400000)), 64)
    x = np.sqrt(square.astype(np.float64)) * np.tile(
        np.concatenate([np.logspace(-6, 2, 31), -np.logspace(-6, 2, 31), [0.0, -0.0]]), len(square) // 64
    )
    x = x.astype(np.float32)
    x[:4] = [np.nan, np.inf, -np.inf, 1e-40]
    for at in some_thresholds(len(x)):
        assert_same(ours.anchored8(x, square, exponent, at), oracle.anchored8(x, square, exponent, at))
    code = np.tile(np.arange(256), len(square) // 64)
    square = np.repeat(square[::64], 256)
    assert_same(ours.from_anchored8(code, square, exponent), oracle.from_anchored8(code, square, exponent))


@pytest.mark.slow
def test_every_code_comes_back(ours: Implementation) -> None:
    """Decoding and encoding again, at whatever threshold, changes no code: checkpoints in float32 lose nothing."""
    code = np.arange(256, 0x7F000000 >> 15)  # all that encoding makes, but 0
    for at in some_thresholds(len(code)):
        assert_same(ours.e8m8(ours.from_e8m8(code), at), code)
    exponents = np.arange(0x00800000, 0x7F000001, 0x00800000)
    code, square = np.tile(np.arange(256), len(exponents)), np.repeat(oracle.floats(exponents), 256)
    for at in some_thresholds(len(code)):
        assert_same(ours.anchored8(ours.from_anchored8(code, square, -4), square, -4, at), code)
    upper = np.arange(2**16)
    value = ours.joined(upper, np.zeros(2**16, np.int64))
    number = ~np.isnan(value)
    for at in some_thresholds(2**16):
        assert_same(ours.bf16(value, at)[number], upper[number])


def test_ends_of_the_ranges(ours: Implementation) -> None:
    """Dithering never makes infinity of a number; what is not finite saturates where a format has no code for it."""
    high, largest = np.array([2**32 - 1]), np.array([np.finfo(np.float32).max], np.float32)
    assert ours.bf16(largest, high)[0] == 0x7F7F
    assert ours.e8m8(largest, high)[0] == ours.e8m8(np.array([np.inf], np.float32), high)[0] == 0x7F000000 >> 15
    denormal = np.array([1e-40], np.float32)
    assert ours.e8m8(denormal, high)[0] == 0
    assert ours.bf16(denormal, high)[0] == 2  # not flushed to 0
    assert (ours.anchored8(np.array([1e30, -1e30], np.float32), np.ones(2, np.float32), -4, high) == [127, 255]).all()
    assert (ours.anchored8(np.ones(2, np.float32), np.array([0.0, 1e-40], np.float32), -4, high) == 0).all()


@pytest.mark.slow
@needs_gxx
def test_every_float_survives_exact_halves(tmp_path: Path) -> None:
    assert Cpp(tmp_path).code.lost() == 0


@pytest.mark.parametrize(
    ("betas", "exponent"), [((0.9, 0.999), -4), ((0.9, 0.9999), -2), ((0.9, 0.95), -6), ((0.995, 0.999), -6)]
)
def test_anchored8_never_saturates(betas: tuple[float, float], exponent: int) -> None:
    """Gradients that grow as fast as the bound allows make the largest |exp_avg| / sqrt(exp_avg_sq)."""
    beta1, beta2 = betas
    assert formats.anchor_exponent(beta1, beta2) == exponent
    lags = np.arange(4000)[::-1]
    grads = (beta1 / beta2) ** np.minimum(lags, 700.0 / abs(math.log(beta1 / beta2)))
    m, v = 0.0, 0.0
    for grad in grads:
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    # The square may be stored half a place too small, and the anchor stands below its root by up to a factor of two.
    for scale in 2.0 ** np.arange(-2, 2, 0.125):
        square = oracle.from_e8m8(oracle.e8m8(np.array([v * scale**2], np.float32), np.array([0])))
        code = oracle.anchored8(np.array([m * scale], np.float32), square, exponent, np.array([2**32 - 1]))
        smaller = oracle.anchored8(np.array([m * scale * 0.99], np.float32), square, exponent, np.array([0]))
        assert code <= 127 and smaller < 127
    assert formats.anchor_exponent(0.99, 0.98) is None
