"""Numbers on disk: one CSV an experiment, job by job, so that what was cut off goes on where it was."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from bench.record import machine

from .common import Job, Row

RESULTS = Path(__file__).parent / "results"
ABOUT = ("device", "backend", "torch", "python", "commit", "dirty", "date")
COLUMNS = ("job", "rows", "condition", "candidate", "steps", "seed", "measure", "x", "value", *ABOUT)


def about() -> dict[str, str]:
    """The columns that say where, when and from which code a row is."""
    found = machine(torch.device("cpu"))
    return {name: found[name] for name in ABOUT}


class Results:
    """The CSV of one experiment.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [] if fresh or not path.exists() else _finished(path)
        self.done = {row["job"] for row in rows}
        part = path.with_suffix(".part")
        part.write_text(_lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]))
        os.replace(part, path)

    def add(self, job: Job, rows: Sequence[Row], origin: dict[str, str]) -> None:
        """Put the rows of a finished job on disk."""
        own = {"job": str(job), "rows": len(rows), "condition": job.condition, "candidate": job.candidate}
        with self.path.open("a", newline="") as file:
            file.write(_lines([own | {"steps": job.steps} | row | origin for row in rows]))
            file.flush()
            os.fsync(file.fileno())
        self.done.add(str(job))


def load(path: Path) -> pd.DataFrame:
    """All rows of finished jobs, in an order that does not depend on who finished first."""
    rows = pd.DataFrame(_finished(path), columns=COLUMNS)
    rows = rows.astype({"rows": int, "steps": int, "seed": int, "x": float, "value": float})
    return rows.sort_values(["job", "measure", "x", "seed"], kind="stable", ignore_index=True)


def _finished(path: Path) -> list[dict[str, str]]:
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
    rows = list(csv.DictReader(io.StringIO(whole)))
    if rows and tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes: --fresh measures anew")
    found = Counter(row["job"] for row in rows)
    return [row for row in rows if found[row["job"]] == int(row["rows"])]


def _lines(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue()
