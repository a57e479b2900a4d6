"""What an experiment consists of, and how its numbers are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from .candidates import BN, CANDIDATES, JUDGED, Candidate
from .verdicts import Interval, every, interval

ACCURACY = "test accuracy, %"  # normalized by running statistics, as deployed
PREQUENTIAL = "prequential accuracy, %"  # of batches predicted before they are trained on
Row = dict[str, Any]  # measure, x, seed, value


@dataclass(frozen=True)
class Job:
    """One training of all ``seeds`` side by side, or whatever an experiment does in one go.

    ``work``: steps it reports, where they are not ``steps``.
    """

    condition: str
    candidate: str
    seeds: tuple[int, ...]
    steps: int
    work: int | None = None

    def __str__(self) -> str:
        return f"{self.condition} | {self.candidate} | seeds {self.seeds[0]}-{self.seeds[-1]} | {self.steps} steps"


@dataclass(frozen=True)
class Judgement:
    """A sentence, the numbers it follows from, and the verdict; a headline is one that answers the claim."""

    statement: str
    numbers: str
    verdict: str
    headline: bool = False


@dataclass(frozen=True)
class Experiment:
    """A claim, how it is tested, and by which rule it is judged.

    ``run`` does a job, reports each step to its second argument and returns rows; ``judge`` and ``draw`` see the rows
    of all jobs. ``table`` names the measure that is tabulated.
    """

    claim: str
    source: str
    setup: str
    rule: str
    limits: str
    jobs: Callable[[bool], list[Job]]
    run: Callable[[Job, Callable[[], None]], list[Row]]
    judge: Callable[[pd.DataFrame], list[Judgement]]
    draw: Callable[[pd.DataFrame], Figure]
    table: str = ACCURACY


def jobs_of(
    conditions: Iterable[tuple[str, int]],
    quick: bool,
    candidates: Iterable[str] = tuple(CANDIDATES),
    seeds: int = 6,
) -> list[Job]:
    """Each condition (a name and steps) with each candidate; the quick ones show only that it works."""
    return [
        Job(condition, candidate, tuple(range(2 if quick else seeds)), 4 if quick else steps)
        for condition, steps in conditions
        for candidate in candidates
    ]


def values(rows: pd.DataFrame, condition: str, candidate: str, measure: str = ACCURACY) -> pd.Series:
    """The last value of a measure, or the mean of several of the same x, by seed.

    Raises:
        KeyError: there is none.
    """
    chosen = rows[(rows.condition == condition) & (rows.candidate == candidate) & (rows.measure == measure)]
    if chosen.empty:
        raise KeyError(f"no {measure} of {candidate} in {condition}")
    return chosen[chosen.x == chosen.x.max()].groupby("seed").value.mean()


def judge_each(
    rows: pd.DataFrame,
    conditions: Sequence[str],
    statement: str,
    rule: Callable[[Interval], str],
    sign: int = 1,
    headline: bool = True,
    measure: str = ACCURACY,
) -> list[Judgement]:
    """The same statement on (BRN - BN) * sign, all conditions together; it needs each of them."""
    found = []
    for candidate, words in JUDGED.items():
        pairs = {
            name: sign * (values(rows, name, candidate, measure) - values(rows, name, BN, measure))
            for name in conditions
        }
        intervals = {name: interval(list(pair)) for name, pair in pairs.items()}
        verdict = every([rule(each) for each in intervals.values()])
        numbers = "; ".join(f"{name}: {each}" for name, each in intervals.items())
        found.append(Judgement(f"{words}: {statement}", numbers, verdict, headline))
    return found


def named(candidates: dict[str, Candidate], name: str) -> Candidate:
    """The candidate of a job.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in candidates:
        raise ValueError(f"no candidate {name!r}: there are {', '.join(candidates)}")
    return candidates[name]
