"""What got slower from one run to another."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from . import report
from .peers import OURS


def compare(before: Path, after: Path, threshold: float, everyone: bool = False) -> tuple[str, int]:
    """A text, and how many of our cases got slower: by more than ``threshold`` and beyond the spread of both runs.

    A case counts as slower only if its p20 now lies above its p80 before, and as faster the other way round.

    Raises:
        ValueError: a file is no CSV of a run, or the runs have no case in common.
    """
    old, new = report.load(before), report.load(after)
    keys = [*report.CASE, "candidate"]
    merged = old.merge(new, on=keys, suffixes=("_before", "_after"))
    merged = merged[merged.p50_us_before.notna() & merged.p50_us_after.notna()]
    if merged.empty:
        raise ValueError(f"{before} and {after} have no measured case in common")
    if not everyone:
        merged = merged[merged.candidate.str.startswith(OURS)]
    merged["after / before"] = merged.p50_us_after / merged.p50_us_before
    slower = merged[(merged["after / before"] > 1 + threshold) & (merged.p20_us_after > merged.p80_us_before)]
    faster = merged[(merged["after / before"] < 1 / (1 + threshold)) & (merged.p80_us_after < merged.p20_us_before)]

    lines = [f"before: {report.about(old)}", f"after:  {report.about(new)}", ""]
    different = [name for name in ("device", "torch", "triton", "backend") if set(old[name]) != set(new[name])]
    if different:
        lines += [f"Beware: {', '.join(different)} differ", ""]
    for title, chosen, ascending in (("slower", slower, False), ("faster", faster, True)):
        lines.append(f"{title}: {len(chosen)} of {len(merged)}")
        if len(chosen):
            shown = chosen.sort_values("after / before", ascending=ascending)
            columns = [*report.CASE[1:], "candidate", "p50_us_before", "p50_us_after", "after / before"]
            lines += ["", report.text(shown[columns].head(40)), ""]
    only = len(pd.concat([old[keys], new[keys]]).drop_duplicates(keep=False))
    if only:
        lines.append(f"in one of the two only: {only} rows")
    return "\n".join(lines), len(slower)
