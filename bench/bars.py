"""The speeds that are aimed at, judged on the CSV of a run: met, missed, or not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from . import report
from .layers import COPY, geometric_mean
from .peers import OURS

BF16, FP32 = ("bfloat16", "channels_last"), ("float32", "contiguous")


@dataclass(frozen=True)
class Bar:
    """A bound on a number of a run; ``value`` gives None where the run has not measured it."""

    name: str
    value: Callable[[pd.DataFrame], float | None]
    bound: float
    at_most: bool = True


def _layers(
    rows: pd.DataFrame, form: tuple[str, str], direction: str, candidate: str = OURS, **where: object
) -> pd.DataFrame:
    chosen = rows[(rows.part == "layer") & (rows.dtype == form[0]) & (rows.layout == form[1]) & (rows.direction == direction)
                  & rows.candidate.str.startswith(candidate) & rows.p50_us.notna()]  # fmt: skip
    for name, value in ({"mode": "eager", "state": "open"} | where).items():
        chosen = chosen[chosen[name] == value]
    return chosen


def _passes(
    form: tuple[str, str],
    direction: str,
    passes: float,
    least_mb: float = 0,
    most_side: int = 10**6,
    state: str = "open",
) -> Callable[[pd.DataFrame], float | None]:
    """Our time / that of so many passes at the copy's speed (a copy is two), the worst layer without a residual."""

    def value(rows: pd.DataFrame) -> float | None:
        ours = _layers(rows, form, direction, state=state)
        ours = ours[(ours.mb >= least_mb) & ~ours.follows.str.startswith("add")]
        ours = ours[[int(size.partition("x")[0]) <= most_side for size in ours["size"]]]
        copy = _layers(rows, form, direction, COPY, state=state).set_index("job").p50_us
        if ours.empty:
            return None
        return float((ours.p50_us.to_numpy() / (copy.reindex(ours.job).to_numpy() * passes / 2)).max())

    return value


def _mean(form: tuple[str, str], peer: str, direction: str = "both") -> Callable[[pd.DataFrame], float | None]:
    """Time of a peer / ours, geometric mean over ResNet-50's layers."""

    def value(rows: pd.DataFrame) -> float | None:
        theirs = _layers(rows, form, direction, peer)
        theirs = theirs[
            (theirs.net == "ResNet-50") & ~((peer == "BatchNorm (") & theirs.candidate.str.contains("compiled"))
        ]
        return geometric_mean(list(theirs.ratio), list(theirs["count"])) if len(theirs) else None

    return value


def _worst(rows: pd.DataFrame) -> float | None:
    peers = rows[
        (rows.part == "layer")
        & (rows["mode"] == "eager")
        & rows.candidate.str.startswith("BatchNorm (")
        & rows.ratio.notna()
    ]
    return float(peers.ratio.min()) if len(peers) else None


def _small(mode: str) -> Callable[[pd.DataFrame], float | None]:
    def value(rows: pd.DataFrame) -> float | None:
        peers = rows[(rows.part == "layer") & (rows["mode"] == mode) & (rows.direction == "both") & (rows.mb < 1)
                     & rows.candidate.str.startswith("BatchNorm (") & rows.ratio.notna()]  # fmt: skip
        return float((1 / peers.ratio).max()) if len(peers) else None

    return value


def _trained(rows: pd.DataFrame) -> float | None:
    table = report.networks(rows)
    if table.empty:
        return None
    flat = table.reset_index()
    chosen = flat[(flat.net == "ResNet-50") & (flat.batch == 256) & (flat.format == " ".join(BF16)) & (flat["mode"] == "eager")
                  & (flat.candidate == f"{OURS}, fused")]  # fmt: skip
    return float(chosen["x BatchNorm"].iloc[0]) if len(chosen) else None


BARS = (
    *(Bar(f"forward / clone, >= 200 MB, {' '.join(form)}", _passes(form, "forward", 2, 200), 1.05) for form in (BF16, FP32)),
    *(Bar(f"backward / 5 passes, >= 200 MB, {' '.join(form)}", _passes(form, "backward", 5, 200), 1.08) for form in (BF16, FP32)),
    *(Bar(f"backward / 5 passes, 28 x 28 and smaller, {' '.join(form)}", _passes(form, "backward", 5, 0, 28), 0.85) for form in (BF16, FP32)),
    *(Bar(f"limits closed, forward / 3 passes, {' '.join(form)}", _passes(form, "forward", 3, state="closed"), 1.10) for form in (BF16, FP32)),
    Bar("ResNet-50's layers, eager BatchNorm / ours, bfloat16 channels_last", _mean(BF16, "BatchNorm ("), 3, at_most=False),
    Bar("ResNet-50's layers, compiled BatchNorm / ours, bfloat16 channels_last", _mean(BF16, "BatchNorm, compiled"), 1.5, at_most=False),
    Bar("ResNet-50's layers, compiled BRN / ours, bfloat16 channels_last", _mean(BF16, "BRN in PyTorch, compiled"), 1.5, at_most=False),
    Bar("ResNet-50's layers, eager BatchNorm / ours, float32 contiguous", _mean(FP32, "BatchNorm ("), 2, at_most=False),
    Bar("ResNet-50's layers, compiled BatchNorm / ours, float32 contiguous", _mean(FP32, "BatchNorm, compiled"), 1.3, at_most=False),
    Bar("worst case of all, eager BatchNorm / ours", _worst, 1, at_most=False),
    Bar("inputs under 1 MB, ours / eager BatchNorm", _small("eager"), 1.3),
    Bar("inputs under 1 MB, ours / eager BatchNorm, in a CUDA graph", _small("graph"), 1.0),
    Bar("training of ResNet-50, images/s against eager BatchNorm, fused, bfloat16 channels_last", _trained, 1.2, at_most=False),
)  # fmt: skip


def judge(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """A table of all bars, and how many are missed."""
    table = []
    for bar in BARS:
        value = bar.value(rows)
        met = value is not None and (value <= bar.bound if bar.at_most else value >= bar.bound)
        table.append({
            "bar": bar.name, "measured": "" if value is None else f"{value:.2f}",
            "bound": f"at {'most' if bar.at_most else 'least'} {bar.bound:g}",
            "result": "not measured" if value is None else "met" if met else "MISSED",
        })  # fmt: skip
    return pd.DataFrame(table), sum(row["result"] == "MISSED" for row in table)
