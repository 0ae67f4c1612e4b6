"""What a few seeds allow to say: means, spreads, and whether a difference shows, by a rule that is fixed beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

FEWEST = 3  # seeds of a comparison
NOTHING = "no difference shows"

RULE = """\
Two sides are compared seed by seed: the same seed means the same first weights and the same order of batches. One is
*better* when the 95 % interval of the mean difference over the seeds (Student's t) leaves zero out and that mean is
larger than the spread of either side (standard deviation over seeds). It is *slightly* better when the interval leaves
zero out, but seeds differ by more. Else *no difference shows*, which is no proof that there is none. Of {count}
comparisons, {expected:.1f} would leave zero out by chance alone if nothing differed."""


def spread(values: list[float]) -> float:
    """Standard deviation of a sample; NaN of a single value."""
    return stdev(values) if len(values) > 1 else math.nan


def plus_minus(values: list[float], digits: int = 2) -> str:
    """Mean and spread, as "2.34 ± 0.21"."""
    if not values:
        return ""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {spread(values):.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """How much less (better) the first one is, seed by seed: mean, half of the 95 % interval, larger spread of the
    two."""

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
    """Of two sets of values by seed, of which less is better; seeds that only one of them has are left out.

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
