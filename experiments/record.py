"""Numbers on disk: one CSV an experiment, job by job, so that what was cut off goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from bench import job_csv
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
        job_csv.write(path, COLUMNS, rows)

    def add(self, job: Job, rows: Sequence[Row], origin: dict[str, str]) -> None:
        """Put the rows of a finished job on disk."""
        own = {"condition": job.condition, "candidate": job.candidate, "steps": job.steps}
        job_csv.append(self.path, COLUMNS, str(job), [own | row for row in rows], origin, digits=6)
        self.done.add(str(job))


def load(path: Path) -> pd.DataFrame:
    """All rows of finished jobs, in an order that does not depend on who finished first."""
    rows = pd.DataFrame(_finished(path), columns=COLUMNS)
    rows = rows.astype({"rows": int, "steps": int, "seed": int, "x": float, "value": float})
    return rows.sort_values(["job", "measure", "x", "seed"], kind="stable", ignore_index=True)


def _finished(path: Path) -> list[dict[str, str]]:
    try:
        return job_csv.read_finished(path, COLUMNS)
    except ValueError as error:
        raise ValueError(f"{error}: --fresh measures anew") from None
