"""Figures of a run: share of a copy's speed against size, bars against peers, whole networks, states of the limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from . import report
from .cases import HOST, SIZES
from .layers import COPY
from .peers import OURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999")  # told apart by all eyes
# Beyond the caches a backward must read x and dy twice: 5 passes, of which 3 count as necessary
CEILING = {"forward": 100.0, "backward": 60.0}


def draw(path: Path, folder: Path) -> list[Path]:
    """All figures that the rows of a run allow, as PNG files in ``folder``."""
    rows = report.load(path)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in (("roofline", _roofline(rows)), ("peers", _peers(rows)), ("networks", _networks(rows)),
                         ("limits", _limits(rows))):  # fmt: skip
        if figure is None:
            continue
        figure.suptitle(report.about(rows), fontsize=8, color="0.4", x=0.01, y=0.0, ha="left", va="top")
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        drawn.append(file)
    return drawn


def _roofline(rows: pd.DataFrame) -> Any:
    chosen = rows[
        (rows.part == "layer") & (rows.state == "open") & rows.percent_of_copy.notna() & (rows.candidate != COPY)
    ]
    formats = list(dict.fromkeys(zip(chosen.dtype, chosen.layout, strict=True)))
    if not formats:
        return None
    figure, axes = plt.subplots(
        len(formats), 2, figsize=(11, 3.4 * len(formats)), squeeze=False, sharex=True, layout="constrained"
    )
    names = [name for name in dict.fromkeys(chosen.candidate) if name == OURS or name.startswith("BatchNorm")]
    for row, form in zip(axes, formats, strict=True):
        for axis, direction in zip(row, CEILING, strict=True):
            some = chosen[(chosen.dtype == form[0]) & (chosen.layout == form[1]) & (chosen.direction == direction)]
            axis.axhline(CEILING[direction], color="0.6", linewidth=0.8, linestyle=":")
            for name, color in zip(names, COLORS, strict=False):
                mine = some[(some.candidate == name)]
                best = mine[mine["mode"] == "graph"]
                mine = pd.concat([best, mine[~mine.job.isin(best.job)]])  # the device's time, without the host's
                swept = mine[mine.net == SIZES].sort_values("mb")
                axis.plot(
                    swept.mb,
                    swept.percent_of_copy,
                    color=color,
                    label=name,
                    marker=".",
                    zorder=3 if name == OURS else 2,
                )
                others = mine[~mine.net.isin([SIZES, HOST])]
                axis.scatter(others.mb, others.percent_of_copy, color=color, s=9, alpha=0.35, linewidth=0)
            axis.set(xscale="log", ylim=(0, None), title=f"{direction}, {' '.join(form)}")
            _plain(axis)
        row[0].set_ylabel("speed, % of a copy")
    for axis in axes[-1]:
        axis.set_xlabel(
            "size of the input, MB (lines: 64 channels; dots: layers of networks; dotted: ceiling beyond the cache)",
            fontsize=7.5,
        )
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _peers(rows: pd.DataFrame) -> Any:
    layers = report.timed_layers(rows)
    layers = layers[layers.net == layers.net.iloc[0]] if len(layers) else layers
    if layers.empty:
        return None
    table = report.means(layers, [*report.FORMAT, "direction"]).drop(columns="layers")
    formats = list(dict.fromkeys(index[:2] for index in table.index))
    figure, axes = plt.subplots(
        1, len(formats), figsize=(5.5 * len(formats), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, form in zip(axes[0], formats, strict=True):
        part = table.loc[form]
        part.plot.bar(ax=axis, color=COLORS[1:], width=0.8, legend=False, rot=0, xlabel="")
        axis.axhline(1, color="0.2", linewidth=1)
        axis.set_title(f"{layers.net.iloc[0]}, {' '.join(form)}", fontsize=10)
        for bars in axis.containers:
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        _plain(axis)
    axes[0][0].set_ylabel(f"time of a peer / time of {OURS}")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper center", ncols=3
    )
    return figure


def _networks(rows: pd.DataFrame) -> Any:
    table = report.networks(rows)
    if table.empty:
        return None
    flat = table.reset_index()
    shape = flat.batch.astype(str) + " x " + flat["size"].str.replace("x", " x ")
    flat["what"] = flat.net + "\n" + shape + "\n" + flat.format + "\n" + flat["mode"]
    figure, axes = plt.subplots(2, 1, figsize=(min(12, 6 + flat.what.nunique()), 7), layout="constrained")
    for axis, column, title in (
        (axes[0], "x BatchNorm", "images/s, relative to BatchNorm"),
        (axes[1], "kept, MB", "kept for the backward, MB"),
    ):
        wide = flat.pivot(index="what", columns="candidate", values=column).reindex(flat.what.unique())
        wide = wide[flat.candidate.unique()].dropna(how="all")
        wide.plot.bar(
            ax=axis,
            color=[COLORS[i] for i in (1, 0, 5, 3)][: wide.shape[1]],
            width=0.8,
            rot=0,
            xlabel="",
            legend=False,
        )
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=7)
        _plain(axis)
    axes[0].axhline(1, color="0.2", linewidth=1)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, loc="outside upper center", ncols=4)
    return figure


def _limits(rows: pd.DataFrame) -> Any:
    table = report.by_state(rows)
    if table.empty:
        return None
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    table.index = [f"{direction}\n{dtype}\n{layout}" for dtype, layout, direction in table.index]
    table.plot.bar(ax=axis, color=COLORS, width=0.8, rot=0, xlabel="")
    axis.axhline(1, color="0.2", linewidth=1)
    axis.set_ylabel("time / with nothing clipped")
    axis.tick_params(axis="x", labelsize=7)
    axis.legend(frameon=False, fontsize=8)
    _plain(axis)
    return figure


def _plain(axis: Any) -> None:
    axis.grid(color="0.92", axis="y")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
