"""Statistics over a few seeds: means, spreads, and the verdict on a difference, by a rule that was fixed beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

FEWEST = 3  # seeds that a comparison requires
NOTHING = "no difference shows"

RULE = """\
Two sides are compared seed by seed. The same seed means the same initial weights and the same order of batches. The
verdict depends on the 95 % interval of the mean difference over the seeds (Student's t), and on the spread of each side
(standard deviation over seeds). One side is *better* if the interval excludes zero and the mean difference is larger
than both spreads. It is *slightly better* if the interval excludes zero but the mean difference is not larger than both
spreads. Otherwise *no difference shows*, which does not prove that there is none. Without any real difference,
{expected:.1f} of {count} intervals would exclude zero by chance."""


def spread(values: list[float]) -> float:
    """Standard deviation of a sample; NaN for a single value."""
    return stdev(values) if len(values) > 1 else math.nan


def plus_minus(values: list[float], digits: int = 2) -> str:
    """Mean and spread, as "2.34 ± 0.21"."""
    if not values:
        return ""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {spread(values):.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """By how much the first is less than the second; less is better. mean: the mean over seeds. half: half the width of
    its 95 % interval. spread: the larger spread of the two."""

    mean: float
    half: float
    spread: float

    @property
    def verdict(self) -> str:
        """ "better", "slightly better", "no difference shows", "slightly worse" or "worse"."""
        if abs(self.mean) <= self.half:
            return NOTHING
        side = "better" if self.mean > 0 else "worse"
        return side if abs(self.mean) > self.spread else f"slightly {side}"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.mean - self.half:+.2f} to {self.mean + self.half:+.2f})"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The difference of two sets of values by seed. Less is better. Seeds that only one set has are left out.

    Raises:
        ValueError: they share fewer than three seeds.
    """
    from scipy.stats import t

    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < FEWEST:
        raise ValueError(f"A comparison needs {FEWEST} seeds that both sides have, but got {len(seeds)}; run more")
    steps = [second[seed] - first[seed] for seed in seeds]
    half = float(t.ppf(0.975, len(steps) - 1)) * stdev(steps) / math.sqrt(len(steps))
    widest = max(spread([values[seed] for seed in seeds]) for values in (first, second))
    return Difference(fmean(steps), half, widest)
