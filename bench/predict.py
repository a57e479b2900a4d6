"""What the model (``model.py``) says of layers and kernels, beside what a run has measured, or an empty column."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from . import report
from .cases import Case, Plan
from .model import GPUS, Kernel, predict
from .peers import OURS
from .record import machine

PLAN = Plan(("ResNet-50",), states=("closed",), size_step=16)
CASE = ("net", "batch", "channels", "size", "follows", "dtype", "layout", "state", "direction")
OF_KERNEL = ("registers", "programs", "resident", "kb_in_flight", "mb_read", "mb_written")
ABOUT = ("gpu", "triton", "commit", "dirty", "date")
COLUMNS = (*CASE, "kernel", *OF_KERNEL, "predicted_us", "measured_us", "measured_by", *ABOUT)


def run(out: Path, gpu: str, measured: Path | None, cases: Sequence[Case] | None = None) -> Path:
    """Write a row for each kernel of each layer and direction, and one for all of a call: ``kernel`` "all".

    Args:
        out: the CSV.
        gpu: one of ``model.GPUS``.
        measured: a run's CSV, whose times of the same calls are put beside the predicted ones.
        cases: default: ResNet-50's layers and the sweeps, with open and closed limits.

    Raises:
        ValueError: the run has measured none of these calls on a GPU.
    """
    times = _times(measured) if measured else {}
    rows, about = [], about_predictions(gpu)
    for case in tqdm(PLAN.cases() if cases is None else cases, unit="layer"):
        for direction in ("forward", "backward"):
            label = _label(case, direction)
            time = times.get(tuple(label.values()), {})
            rows += [label | row | about for row in _rows(predict(case, direction, GPUS[gpu]), time)]
    if measured and not any(row.get("measured_us") for row in rows):
        raise ValueError(f"{measured} has measured none of these calls on a GPU")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out


def about_predictions(gpu: str) -> dict[str, str]:
    """The columns ``ABOUT``: for which GPU, and what compiled and predicted."""
    here = machine(torch.device("cpu")) | {"gpu": gpu}
    return {name: here[name] for name in ABOUT}


def errors(path: Path) -> str:
    """How far predicted and measured times are apart, in one line."""
    rows = pd.read_csv(path)
    rows = rows[(rows.kernel == "all") & rows.measured_us.notna()]
    if rows.empty:
        return "nothing is measured yet"
    error = (rows.predicted_us / rows.measured_us - 1).abs()
    return (
        f"{len(rows)} calls: predicted and measured differ by {error.median():.0%} (median), "
        f"{error.quantile(0.9):.0%} (nine of ten), {error.max():.0%} (most)"
    )


def _label(case: Case, direction: str) -> dict[str, Any]:
    layer = case.layer
    return {
        "net": layer.net, "batch": layer.batch, "channels": layer.channels, "size": "x".join(map(str, layer.size)),
        "follows": layer.follows, "dtype": case.dtype, "layout": case.layout, "state": case.state,
        "direction": direction,
    }  # fmt: skip


def _rows(kernels: list[Kernel], time: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kernel in kernels:
        yield {
            "kernel": kernel.name, "registers": kernel.registers, "programs": kernel.programs,
            "resident": kernel.resident, "kb_in_flight": f"{kernel.in_flight / 1024:.1f}",
            "mb_read": f"{kernel.read / 1e6:.4g}", "mb_written": f"{kernel.written / 1e6:.4g}",
            "predicted_us": f"{1e6 * kernel.seconds:.4g}",
        }  # fmt: skip
    read, written, seconds = (sum(getattr(k, name) for k in kernels) for name in ("read", "written", "seconds"))
    yield {
        "kernel": "all", "mb_read": f"{read / 1e6:.4g}", "mb_written": f"{written / 1e6:.4g}",
        "predicted_us": f"{1e6 * seconds:.4g}", **time,
    }  # fmt: skip


def _times(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """A run's times of our calls, by what they are of."""
    rows = report.load(path)
    rows = rows[(rows.device_type == "cuda") & (rows["mode"] == "eager") & (rows.candidate == OURS)]
    rows = rows[(rows.part == "layer") & rows.p50_us.notna()]
    return {
        tuple(int(row[name]) if name in ("batch", "channels") else row[name] for name in CASE): {
            "measured_us": row["p50_us"], "measured_by": f"{row['device']}, {row['commit']}, {row['date']}"
        }
        for row in rows.to_dict("records")
    }  # fmt: skip
