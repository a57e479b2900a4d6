"""Tables from the CSVs of runs: for the terminal, for the documentation, and for figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from .cases import CHANNELS, HOST, SIZES
from .layers import COPY
from .peers import EAGER, OPEN, OURS
from .record import ABOUT, MEASURED

FORMAT = ["dtype", "layout"]
NUMBERS = [
    "batch", "channels", "count", "mb", "p20_us", "p50_us", "p80_us", "ratio", "gb_per_s", "percent_of_copy",
    "images_per_s", "peak_mb", "kept_mb",
]  # fmt: skip
TEXTS = [name for name in (*MEASURED, *ABOUT) if name not in NUMBERS]
CASE = ["part", "net", "batch", "channels", "size", "follows", *FORMAT, "state", "direction", "mode"]


def load(path: str | Path) -> pd.DataFrame:
    """The rows of a run, finished or not.

    Raises:
        ValueError: it is not a CSV of ``brn bench``.
    """
    numbers = dict.fromkeys(NUMBERS, [""])
    rows = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=numbers)
    if "calls" not in rows:  # older runs
        rows["calls"] = ""
    missing = sorted({*NUMBERS, *TEXTS} - set(rows.columns))
    if missing or rows.empty:
        raise ValueError(f"{path} is not a CSV of brn bench: it has no {missing[0] if missing else 'rows'}")
    return rows.astype({"batch": "Int64", "channels": "Int64"})


def about(rows: pd.DataFrame) -> str:
    """Where and when a run was made, in a line."""
    first = rows.iloc[0]
    parts = [
        first.device,
        f"driver {first.driver}" if first.driver else "",
        f"backend {first.backend}",
        f"calls {first.calls}" if first.calls else "",
        f"torch {first.torch}",
        f"triton {first.triton}" if first.backend == "triton" else "",
        str(first.date),
        f"commit {first.commit}{' with changes' if first.dirty else ''}",
    ]
    return ", ".join(part for part in parts if part)


def timed_layers(rows: pd.DataFrame, state: str = "open", mode: str = "eager") -> pd.DataFrame:
    """The rows of layers of networks that have a ratio."""
    chosen = rows[(rows.part == "layer") & (rows.state == state) & (rows["mode"] == mode) & rows.ratio.notna()]
    return chosen[~chosen.net.isin([SIZES, CHANNELS, HOST])]


def geometric_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Of ratios, each as often as its weight says."""
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / sum(weights))


def eager_batchnorm(rows: pd.DataFrame) -> pd.DataFrame:
    """PyTorch's BatchNorm by the kernels that it takes itself: they come first, before those it can be made to take."""
    return rows[rows.candidate.str.startswith(EAGER)].drop_duplicates(["job", "direction", "mode"])


def means(rows: pd.DataFrame, by: Sequence[str], candidates: Sequence[str] | None = None) -> pd.DataFrame:
    """Geometric means of time of a peer / our time, each layer as often as its network has it; a column a peer."""
    chosen = rows[~rows.candidate.isin([OURS, COPY])]
    if candidates is not None:
        chosen = chosen[chosen.candidate.isin(candidates)]
    if chosen.empty:
        return pd.DataFrame()
    peers = list(dict.fromkeys(chosen.candidate))
    rows_of = chosen.groupby([*by, "candidate"], sort=False)[["ratio", "count"]]
    table = rows_of.apply(lambda group: geometric_mean(list(group.ratio), list(group["count"]))).unstack("candidate")
    table.insert(0, "layers", chosen.groupby(list(by), sort=False).job.nunique())
    number = chosen.groupby("candidate").job.nunique()
    fewer = {name: f"{name} (fewer layers)" for name in peers if number[name] < number.max()}
    return table[["layers", *peers]].rename(columns=fewer)


def losses(rows: pd.DataFrame) -> pd.DataFrame:
    """Where a peer is faster than we are, the worst first."""
    chosen = rows[(rows.ratio < 1) & ~rows.candidate.isin([OURS, COPY]) & ~rows.candidate.str.startswith(OURS)]
    return chosen.sort_values("ratio")[[*CASE[1:], "candidate", "ratio"]]


def won(rows: pd.DataFrame) -> str:
    """In how many comparisons we are faster."""
    chosen = rows[rows.ratio.notna() & ~rows.candidate.isin([COPY]) & ~rows.candidate.str.startswith(OURS)]
    return f"faster than the peer in {int((chosen.ratio > 1).sum())} of {len(chosen)} comparisons"


def against_copy(rows: pd.DataFrame) -> pd.DataFrame:
    """Our share of the speed of a copy, in percent: the median over the layers of 8 MB and more, and of a network."""
    chosen = timed_layers(rows)
    chosen = chosen[(chosen.candidate == OURS) & (chosen.mb >= 8)]
    if chosen.empty:
        return pd.DataFrame()
    return chosen.pivot_table("percent_of_copy", [*FORMAT], "direction", aggfunc="median", sort=False).round(0)


def by_state(rows: pd.DataFrame) -> pd.DataFrame:
    """Our time in each state of the limits / with open limits and nothing clipped, in the same turns: the median."""
    chosen = rows[(rows.part == "layer") & (rows["mode"] == "eager") & (rows.candidate == OPEN) & rows.ratio.notna()]
    if chosen.empty:
        return pd.DataFrame()
    relative = chosen.assign(relative=1 / chosen.ratio)
    return relative.pivot_table("relative", [*FORMAT, "direction"], "state", aggfunc="median", sort=False)


def host(rows: pd.DataFrame) -> pd.DataFrame:
    """Microseconds of the host for a call."""
    chosen = rows[(rows["mode"] == "host") & rows.p50_us.notna()]
    return chosen.pivot_table("p50_us", "candidate", "direction", sort=False) if len(chosen) else pd.DataFrame()


def networks(rows: pd.DataFrame) -> pd.DataFrame:
    """Whole networks: images a second and peak memory of each candidate."""
    chosen = rows[(rows.part == "network") & rows.images_per_s.notna()].copy()
    if chosen.empty:
        return pd.DataFrame()
    chosen["format"] = chosen.dtype + " " + chosen.layout
    chosen["ms a step"] = chosen.p50_us / 1e3
    chosen = chosen.rename(columns={"peak_mb": "peak, MB", "kept_mb": "kept, MB"})
    chosen["images/s"] = chosen.images_per_s
    base = chosen[chosen.candidate == "BatchNorm"].set_index(["net", "size", "batch", "format", "mode"]).images_per_s
    index = pd.MultiIndex.from_frame(chosen[["net", "size", "batch", "format", "mode"]])
    chosen["x BatchNorm"] = chosen.images_per_s.to_numpy() / base.reindex(index).to_numpy()
    return chosen.set_index(["net", "batch", "size", "format", "mode", "candidate"])[
        ["images/s", "x BatchNorm", "ms a step", "peak, MB", "kept, MB"]
    ]


def left_out(rows: pd.DataFrame) -> pd.DataFrame:
    """What was not measured, why, and in how many cases."""
    chosen = rows[rows.error != ""]
    return chosen.groupby(["candidate", "error"], sort=False).size().rename("cases").reset_index()


def text(table: pd.DataFrame, digits: int = 2, style: str = "simple") -> str:
    """A table as text or Markdown."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.0f}"
        return str(value)

    flat = table.reset_index() if any(table.index.names) else table
    repeated = [name for name in table.index.names if name]
    lines = [[cell(value) for value in row] for row in flat.itertuples(index=False)]
    shown = [list(line) for line in lines]
    for i in range(1, len(lines)):  # a group's name is printed once
        for j in range(max(0, len(repeated) - 1)):
            if lines[i][: j + 1] == lines[i - 1][: j + 1]:
                shown[i][j] = ""
    align = ["right" if pd.api.types.is_numeric_dtype(kind) else "left" for kind in flat.dtypes]
    headers = [str(name) for name in flat.columns]
    return tabulate(shown, headers, tablefmt=style, disable_numparse=True, colalign=align if shown else None)


def summary(rows: pd.DataFrame) -> str:
    """What a run found, on a screen."""
    layers = timed_layers(rows)
    sections = [
        ("time of a peer / our time, geometric means over a network's layers (above 1: ours is faster)",
         means(layers, ["net", "direction", *FORMAT])),
        ("speed in percent of a copy, every tensor counted once (median, layers of 8 MB and more)", against_copy(rows)),
        ("our time / with open limits and nothing clipped", by_state(rows)),
        ("host time of a call, microseconds", host(rows)),
        ("whole networks, one training step", networks(rows)),
        ("not measured", left_out(rows)),
        ("the worst losses", losses(rows).head(8)),
    ]  # fmt: skip
    parts = [f"{title}\n\n{text(table)}" for title, table in sections if len(table)]
    return "\n\n".join([about(rows), *parts, won(rows)])
