"""An advice as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .advise import Advice

PARTS = (("noise", "sampling", "#56B4E9"), ("excess", "composition", "#D55E00"), ("drift", "trend", "#009E73"))


def check_format(path: str | Path) -> None:
    """Raise ValueError if matplotlib writes no files of this kind."""
    kinds = FigureCanvasAgg.get_supported_filetypes()
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind and kind not in kinds:
        raise ValueError(f"no figure can be written to {str(path)!r}: its name must end in one of .{', .'.join(kinds)}")


def draw(advice: Advice, path: str | Path) -> None:
    """Per layer, what the mean square of d is made of: sampling, composition, trend; and d itself as measured."""
    names = [layer.layer for layer in advice.layers]
    figure = Figure(figsize=(8, 1.8 + 0.28 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = [0.0] * len(names)
    for attribute, label, color in PARTS:
        width = [getattr(layer, attribute) ** 2 for layer in advice.layers]
        axes.barh(names, width, left=left, label=label, color=color)
        left = [start + w for start, w in zip(left, width, strict=True)]
    axes.plot([layer.d**2 for layer in advice.layers], names, "k|", markersize=12, label="measured")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("mean square of d = (batch mean - population mean) / deviation")
    axes.set_title(f"Use {advice.choice}: {advice.statements[0].says}", fontsize=9, wrap=True)
    axes.legend(fontsize=8)
    figure.savefig(Path(path))
