"""The figures of the experiments: means with their 95 % t-intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import pandas as pd

from .candidates import COLORS
from .common import ACCURACY
from .verdicts import interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Draw = Callable[[pd.DataFrame], plt.Figure]


def color_of(candidates: Sequence[str]) -> dict[str, str]:
    """Known candidates keep their colours; others get what is left of the cycle."""
    others = iter(("#000000", "#8B4513", "#7F7F7F", "#BCBD22", "#17BECF", "#9467BD", "#2F4F4F", "#E377C2"))
    return {name: COLORS.get(name) or next(others) for name in candidates}


def curves(conditions: Sequence[str], measure: str = ACCURACY, xlabel: str = "training step") -> Draw:
    """A measure over its x: one panel a condition, one line a candidate."""

    def draw(rows: pd.DataFrame) -> plt.Figure:
        figure, panels = _panels(conditions)
        rows = rows[rows.measure == measure]
        for panel, condition in zip(panels, conditions, strict=True):
            chosen = rows[rows.condition == condition]
            for name, color in color_of(list(dict.fromkeys(rows.candidate))).items():
                _line(panel, chosen[chosen.candidate == name], name, color)
            if measure == ACCURACY and not chosen.empty:
                panel.set_ylim(_floor(chosen), 100.5)
            panel.set(title=condition, xlabel=xlabel)
        return _finish(figure, panels, measure)

    return draw


def by_layer(conditions: Sequence[str], measure: str) -> Draw:
    """The same, where x is a layer."""
    draw_curves = curves(conditions, measure, "layer, from input to output; last: logits")

    def draw(rows: pd.DataFrame) -> plt.Figure:
        figure = draw_curves(rows)
        for panel in figure.axes:
            panel.set_yscale("symlog", linthresh=1)
            panel.xaxis.get_major_locator().set_params(integer=True)
        return figure

    return draw


def intervals(conditions: Sequence[str], measure: str = ACCURACY) -> Draw:
    """The last value of a measure: one panel a condition, one interval a candidate."""

    def draw(rows: pd.DataFrame) -> plt.Figure:
        figure, panels = _panels(conditions)
        rows = rows[rows.measure == measure]
        names = list(dict.fromkeys(rows.candidate))
        for panel, condition in zip(panels, conditions, strict=True):
            for place, (name, color) in enumerate(color_of(names).items()):
                chosen = rows[(rows.condition == condition) & (rows.candidate == name)]
                if not chosen.empty:
                    last = chosen[chosen.x == chosen.x.max()].groupby("seed").value.mean()
                    of = interval(list(last))
                    panel.scatter([place] * len(last), last, color=color, alpha=0.3, s=12)
                    panel.errorbar(place, of.mean, of.mean - of.low, fmt="o", color=color, capsize=4, label=name)
            panel.set_xticks([])
            panel.set_title(condition)
        return _finish(figure, panels, measure)

    return draw


def _panels(conditions: Sequence[str]) -> tuple[plt.Figure, list[plt.Axes]]:
    columns = min(3, len(conditions))
    lines = -(-len(conditions) // columns)
    size = (max(4.2 * columns, 6.5) + 1.8, 3.4 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for spare in panels[len(conditions) :]:
        spare.remove()
    return figure, panels[: len(conditions)]


def _line(panel: plt.Axes, rows: pd.DataFrame, name: str, color: str) -> None:
    if rows.empty:
        return
    of = rows.groupby("x").value.apply(lambda values: interval(list(values)))
    panel.plot(of.index, [each.mean for each in of], color=color, label=name, linewidth=1.6)
    panel.fill_between(of.index, [each.low for each in of], [each.high for each in of], color=color, alpha=0.15, lw=0)


def _floor(rows: pd.DataFrame) -> float:
    """Where the axis of an accuracy begins: what is seen is the second half of the training."""
    late = rows[rows.x >= rows.x.max() / 2]
    return max(0.0, late.groupby(["candidate", "x"]).value.mean().min() - 5)


def _finish(figure: plt.Figure, panels: Sequence[plt.Axes], ylabel: str) -> plt.Figure:
    for panel in panels:
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(ylabel)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=9)
    return figure
