"""A CSV that jobs append their rows to. What a job that was cut off left in it does not count.

Its columns include ``job``, a job's name, and ``rows``, how many rows that job has in all.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_finished(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of all finished jobs.

    Raises:
        ValueError: the file has other columns.
    """
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
    rows = list(csv.DictReader(io.StringIO(whole)))
    if rows and set(rows[0]) != set(columns):
        raise ValueError(f"{path} has other columns than this version writes")
    found = Counter(row["job"] for row in rows)
    return [row for row in rows if found[row["job"]] == int(row["rows"])]


def write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A new file in the place of whatever was there."""
    new = path.with_name(path.name + ".new")
    new.write_text(_lines(columns, [dict(zip(columns, columns, strict=True)), *rows], digits=0))
    os.replace(new, path)


def append(
    path: Path,
    columns: Sequence[str],
    job: str,
    rows: Sequence[Mapping[str, Any]],
    same: Mapping[str, Any],
    digits: int,
) -> None:
    """Put the rows of a finished job on disk, each with the columns that are the ``same`` in all of them.

    ``digits``: significant ones of a float.
    """
    with path.open("a", newline="") as file:
        file.write(_lines(columns, [{"job": job, "rows": len(rows), **row, **same} for row in rows], digits))
        file.flush()
        os.fsync(file.fileno())


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], digits: int) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    for row in rows:
        writer.writerow({k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
