"""From numbers to a verdict: the only place where "confirmed", "refuted" and "not decided" are decided."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

CONFIRMED, REFUTED, NOT_DECIDED = "confirmed", "refuted", "not decided"
POINTS = 0.5  # of accuracy: less is negligible. On 597 test images a point is six images.
METHOD = f"""
Values of candidates are paired by seed (the same initial weights and batches); an interval is the mean of the paired
differences with its 95 % t-interval over the seeds. "More than x" is confirmed if the whole interval is above x,
refuted if all of it is below x plus what is negligible ({POINTS:g} points of accuracy unless said otherwise). "Equal"
is confirmed if all of the interval is within the margin, refuted if all of it is outside. Of several statements that
must all hold, one refuted one refutes; all must be confirmed to confirm. All else is not decided. Intervals are not
corrected for the number of comparisons: of twenty, one is expected to miss by chance.
"""


@dataclass(frozen=True)
class Interval:
    """Mean and 95 % t-interval; infinitely wide for fewer than two values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.mean:+.2f} (one value, no interval)"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def interval(values: Sequence[float]) -> Interval:
    """Of values that are independent of each other, such as one a seed.

    Raises:
        ValueError: there is none, or one is not finite.
    """
    values = [float(value) for value in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs finite values, got {values}")
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def more(values: Interval, than: float = 0.0, negligible: float = POINTS) -> str:
    """Whether they are more than ``than``."""
    if values.low > than:
        return CONFIRMED
    return REFUTED if values.high < than + negligible else NOT_DECIDED


def less(values: Interval, than: float) -> str:
    """Whether they are less than ``than``."""
    return more(Interval(-values.mean, -values.high, -values.low), -than, negligible=0.0)


def equal(values: Interval, margin: float = POINTS) -> str:
    """Whether they are 0 up to ``margin``."""
    if -margin < values.low and values.high < margin:
        return CONFIRMED
    return REFUTED if values.low > margin or values.high < -margin else NOT_DECIDED


def every(verdicts: Sequence[str]) -> str:
    """Of a claim that needs each of them."""
    if REFUTED in verdicts:
        return REFUTED
    return CONFIRMED if set(verdicts) == {CONFIRMED} else NOT_DECIDED
