"""The speeds that are aimed at, judged on the CSV of a run: met, missed, or not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from . import report
from .layers import COPY
from .peers import EAGER, OURS

BF16, FP32 = ("bfloat16", "channels_last"), ("float32", "contiguous")


@dataclass(frozen=True)
class Bar:
    """A bound on a number of a run; ``value`` gives None where the run has not measured it."""

    name: str
    value: Callable[[pd.DataFrame], float | None]
    bound: float
    at_most: bool = True


def _layers(
    rows: pd.DataFrame, form: tuple[str, str], direction: str, candidate: str = OURS, state: str = "open"
) -> pd.DataFrame:
    chosen = rows[(rows.part == "layer") & (rows["mode"] == "eager") & rows.p50_us.notna()]
    chosen = chosen[(chosen.dtype == form[0]) & (chosen.layout == form[1]) & (chosen.state == state)]
    chosen = chosen[chosen.direction == direction]
    return report.eager_batchnorm(chosen) if candidate == EAGER else chosen[chosen.candidate == candidate]


def _passes(
    form: tuple[str, str],
    direction: str,
    passes: float,
    least_mb: float = 0,
    most_side: int | None = None,
    state: str = "open",
) -> Callable[[pd.DataFrame], float | None]:
    """Our time / that of so many passes at the copy's speed (a copy is two), the worst layer without a residual.

    Of ResNet-50 alone, if ``most_side`` limits the images' side.
    """

    def value(rows: pd.DataFrame) -> float | None:
        ours = _layers(rows, form, direction, state=state)
        ours = ours[(ours.mb >= least_mb) & ~ours.follows.str.startswith("add")]
        if most_side is not None:
            ours = ours[ours.net == "ResNet-50"]
            ours = ours[[int(size.partition("x")[0]) <= most_side for size in ours["size"]]]
        copy = _layers(rows, form, direction, COPY, state=state).set_index("job").p50_us
        if ours.empty:
            return None
        return float((ours.p50_us.to_numpy() / (copy.reindex(ours.job).to_numpy() * passes / 2)).max())

    return value


def _mean(form: tuple[str, str], peer: str) -> Callable[[pd.DataFrame], float | None]:
    """Time of a peer / ours, forward and backward, geometric mean over ResNet-50's layers."""

    def value(rows: pd.DataFrame) -> float | None:
        theirs = _layers(rows, form, "both", peer)
        theirs = theirs[theirs.net == "ResNet-50"]
        return report.geometric_mean(list(theirs.ratio), list(theirs["count"])) if len(theirs) else None

    return value


def _eager(rows: pd.DataFrame, mode: str = "eager") -> pd.DataFrame:
    chosen = rows[(rows.part == "layer") & (rows["mode"] == mode) & rows.ratio.notna()]
    return report.eager_batchnorm(chosen)


def _worst(rows: pd.DataFrame) -> float | None:
    ratios = _eager(rows).ratio
    return float(ratios.min()) if len(ratios) else None


def _small(mode: str) -> Callable[[pd.DataFrame], float | None]:
    """Our time / eager BatchNorm's, forward and backward of inputs under 1 MB, the worst; "host": the host's time."""

    def value(rows: pd.DataFrame) -> float | None:
        chosen = _eager(rows, mode)
        ratios = chosen[(chosen.direction == "both") & (chosen.mb < 1)].ratio
        return float((1 / ratios).max()) if len(ratios) else None

    return value


def _trained(rows: pd.DataFrame) -> float | None:
    table = report.networks(rows).reset_index()
    if table.empty:
        return None
    wanted = {
        "net": "ResNet-50",
        "batch": 256,
        "format": " ".join(BF16),
        "mode": "eager",
        "candidate": f"{OURS}, fused",
    }
    for name, value in wanted.items():
        table = table[table[name] == value]
    return float(table["x BatchNorm"].iloc[0]) if len(table) else None


def _bars() -> list[Bar]:
    bars = []
    for form in (BF16, FP32):
        name = " ".join(form)
        bars += [
            Bar(f"forward / clone, >= 200 MB, {name}", _passes(form, "forward", 2, least_mb=200), 1.05),
            Bar(f"backward / 5 passes, >= 200 MB, {name}", _passes(form, "backward", 5, least_mb=200), 1.08),
            Bar(f"backward / 5 passes, 28 x 28 and smaller, {name}", _passes(form, "backward", 5, most_side=28), 0.85),
            Bar(f"limits closed, forward / 3 passes, {name}", _passes(form, "forward", 3, state="closed"), 1.10),
        ]
    for form, peer, bound in (
        (BF16, EAGER, 3), (BF16, "BatchNorm, compiled", 1.5), (BF16, "BRN in PyTorch, compiled", 1.5),
        (FP32, EAGER, 2), (FP32, "BatchNorm, compiled", 1.3),
    ):  # fmt: skip
        name = "eager BatchNorm" if peer == EAGER else peer
        bars.append(
            Bar(f"ResNet-50's layers, {name} / ours, {' '.join(form)}", _mean(form, peer), bound, at_most=False)
        )
    return [
        *bars,
        Bar("worst case of all, eager BatchNorm / ours", _worst, 1, at_most=False),
        Bar("inputs under 1 MB, ours / eager BatchNorm, wall time", _small("host"), 1.3),
        Bar("inputs under 1 MB, ours / eager BatchNorm, in a CUDA graph", _small("graph"), 1.0),
        Bar(f"training of ResNet-50, fused / BatchNorm, images/s, {' '.join(BF16)}", _trained, 1.2, at_most=False),
    ]


BARS = _bars()


MET, MISSED, NOT_MEASURED = RESULTS = ("met", "MISSED", "not measured")


def judge(rows: pd.DataFrame) -> tuple[pd.DataFrame, Counter[str]]:
    """A table of all bars, and how many of each result there are."""
    table = []
    for bar in BARS:
        value = bar.value(rows)
        met = value is not None and (value <= bar.bound if bar.at_most else value >= bar.bound)
        table.append({
            "bar": bar.name, "measured": "" if value is None else f"{value:.2f}",
            "bound": f"at {'most' if bar.at_most else 'least'} {bar.bound:g}",
            "result": NOT_MEASURED if value is None else MET if met else MISSED,
        })  # fmt: skip
    return pd.DataFrame(table), Counter(row["result"] for row in table)
