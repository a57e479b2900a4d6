"""An advice in words and as a table."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .advise import Advice

WIDTH = 110
COLUMNS = ("samples", "eff. count", "d", "sampling", "composition", "trend", "Neumann", "log r")


def as_text(advice: Advice) -> str:
    """The choice, every statement with its number and reason, the layers, and the line of code."""
    lines = [f"Use {advice.choice} ({advice.batches} batches, {len(advice.layers)} layers)", ""]
    for statement in advice.statements:
        lines += textwrap.wrap(f"- {statement.says}: {statement.reason}.", WIDTH, subsequent_indent="  ")
    lines += [f"Note: {note}." for note in advice.notes]
    lines += ["", *_table(advice), "", "d and its parts: root mean squares, in standard deviations of a channel."]
    return "\n".join([*lines, "", advice.code])


def _table(advice: Advice) -> list[str]:
    rows = [
        (
            x.layer, f"{x.samples}", f"{x.effective_count:.1f}", f"{x.d:.3f}", f"{x.noise:.3f}", f"{x.excess:.3f}",
            f"{x.drift:.3f}", f"{x.neumann:.2f}", f"{x.log_r:.3f}",
        )
        for x in (*advice.layers, advice.overall)
    ]  # fmt: skip
    wide = max(len("layer"), *(len(row[0]) for row in rows))
    return [
        name.ljust(wide)
        + "".join(f"  {cell:>{max(len(title), 6)}}" for cell, title in zip(cells, COLUMNS, strict=True))
        for name, *cells in [("layer", *COLUMNS), *rows]
    ]
