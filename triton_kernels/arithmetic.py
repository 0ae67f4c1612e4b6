"""The arithmetic that rules share, on values already in registers. Mirrors csrc/arithmetic.h."""

import triton
import triton.language as tl


@triton.constexpr_function
def largest(dtype: tl.dtype) -> float:
    """The largest finite number of a dtype."""
    return 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38


@triton.jit
def maximum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The maximum; NaN if either argument is NaN, as in torch.maximum."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The minimum; NaN if either argument is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite(x: tl.tensor) -> tl.tensor:
    """x, or 0 where it is inf or NaN: 0 * inf would be NaN."""
    return tl.where(tl.abs(x) <= largest(x.dtype), x, 0.0)


@triton.jit
def square_root(x: tl.tensor) -> tl.tensor:
    """The correctly rounded root. tl.sqrt is correctly rounded in float64 only; tl.sqrt_rn takes float32 only."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The correctly rounded quotient. / is correctly rounded in float64 only; tl.div_rn takes float32 only."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def lerp(average: tl.tensor, x: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """(1 - weight) * average + weight * x. `weight` is 1 - beta, rounded once from float64. For beta from 0.5,
    1 - weight is closer to beta than beta rounded to float, and the two weights sum to 1. With weight 1 (beta 0) the
    result is x if the average is finite."""
    return tl.fma(weight, x, tl.fma(-weight, average, average))


@triton.jit
def lerp_square(average: tl.tensor, x: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """(1 - weight) * average + weight * x * x. x * x alone is not computed, because it can overflow where
    weight * x * x does not. An infinite average stays inf: unbounded, inf - inf would give NaN."""
    bounded = minimum(average, largest(x.dtype))
    return tl.fma(weight * x, x, tl.fma(-weight, bounded, average))


@triton.jit
def keep(average: tl.tensor, factor: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """beta * average. For beta from 0.5, small_beta is 0 and beta is computed as 1 - weight, as in lerp. Below 0.5 the
    rounding error of the weight is large relative to beta. Then small_beta is beta, rounded once. It is constant for a
    tensor. factor: the average, or a finite number in place of an infinite average."""
    return tl.where(small_beta != 0.0, small_beta * average, tl.fma(-weight, factor, average))


@triton.jit
def move_average(average: tl.tensor, x: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """beta * average + (1 - beta) * x, with an error of a few ulp for any beta in [0, 1)."""
    return tl.fma(weight, x, keep(average, average, weight, small_beta))


@triton.jit
def move_average_square(average: tl.tensor, x: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """beta * average + (1 - beta) * x * x. As in lerp_square, x * x alone is not computed, and an infinite average
    stays inf."""
    return tl.fma(weight * x, x, keep(average, minimum(average, largest(x.dtype)), weight, small_beta))


@triton.jit
def sign(x: tl.tensor) -> tl.tensor:
    """-1, 0 or 1. The sign of NaN is 0, as in torch.sign."""
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)


@triton.jit
def largest_lr(lr: tl.tensor, before: tl.tensor) -> tl.tensor:
    """The larger of lr and the largest lr before, which is stored as float32. A constant lr stays the largest."""
    return tl.where(lr.to(tl.float32).to(tl.float64) >= before, lr, before)


@triton.jit
def positive_power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base**exponent for base >= 0."""
    return tl.where(exponent == 0.0, 1.0, tl.exp(exponent * tl.log(base)))
