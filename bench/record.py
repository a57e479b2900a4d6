"""Results on disk, with all that one must know to read them; a run that was cut off goes on where it was."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import job_csv

RESULTS = Path(__file__).parent / "results"
MEASURED = (
    "job", "rows", "part", "net", "batch", "channels", "size", "follows", "count", "mb", "dtype", "layout", "state",
    "direction", "mode", "candidate", "p20_us", "p50_us", "p80_us", "ratio", "gb_per_s", "percent_of_copy",
    "images_per_s", "peak_mb", "kept_mb", "error",
)  # fmt: skip
ABOUT = (
    "level", "device_type", "device", "driver", "backend", "calls", "torch", "triton", "python", "commit", "dirty",
    "date",
)  # fmt: skip
COLUMNS = MEASURED + ABOUT


def machine(device: torch.device) -> dict[str, str]:
    """Device, versions, commit and date."""
    from brn_kernels import backends, node

    cuda = device.type == "cuda"
    kernels = backends.resolve(backends.selected(), device.type)
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "driver": _driver() if cuda else "",
        "backend": kernels.__name__.rpartition(".")[2],
        "calls": "in C++" if node.module() is not None and hasattr(kernels, "forward_in_cpp") else "in Python",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        **commit(),
        "date": str(datetime.date.today()),
    }  # fmt: skip


def commit() -> dict[str, str]:
    """The commit; ``dirty`` names the changes that are not committed, if git knows of any.

    The environment variable COMMIT names the commit of a copy without its history.
    """
    has_git = _has_git()
    return {
        "commit": os.environ.get("COMMIT") or (_output("git", "rev-parse", "--short", "HEAD") if has_git else ""),
        "dirty": _changes() if has_git else "",
    }


def processor() -> str:
    """The CPU's name, its threads in use, and the instruction set our loops use on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    loops = getattr(torch.ops.brn_kernels_native, "instruction_set", None)
    return ", ".join([name, f"{torch.get_num_threads()} threads", *([loops()] if loops else [])])


class Recorder:
    """The CSV of one run. Rows go to ``<path>.part``, job by job; ``finish`` gives it its name.

    Args:
        path: the finished file.
        about: the columns that are the same in all rows; a started file goes on only if it has the same.

    Raises:
        FileExistsError: the file is finished already, or was started by something else.
    """

    def __init__(self, path: Path, about: dict[str, str], fresh: bool = False) -> None:
        self.path, self.part, self.about = path, path.with_name(path.name + ".part"), about
        if path.exists() and not fresh:
            raise FileExistsError(f"{path} is finished already; --fresh measures again, --out NAME elsewhere")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [] if fresh else self._started()
        self.done = {row["job"] for row in rows}
        job_csv.write(self.part, COLUMNS, rows)
        if fresh:  # else an older run's numbers would stand for this one's, were it cut off
            path.unlink(missing_ok=True)

    def _started(self) -> list[dict[str, str]]:
        """The rows of all finished jobs."""
        if not self.part.exists():
            return []
        try:
            rows = job_csv.read_finished(self.part, COLUMNS)
        except ValueError as error:
            raise FileExistsError(f"{error}: --fresh discards it, --out NAME leaves it") from None
        for name, value in self.about.items():
            other = next((row[name] for row in rows if row[name] != value), value)
            if other != value and name != "date":
                raise FileExistsError(
                    f"{self.part} was started with another {name} ({other}, now {value}): --fresh discards it, "
                    "--out NAME leaves it"
                )
        return rows

    def add(self, job: str, rows: Sequence[dict[str, Any]]) -> None:
        """Put the rows of a finished job on disk."""
        job_csv.append(self.part, COLUMNS, job, rows, self.about, digits=4)
        self.done.add(job)

    def finish(self) -> Path:
        """Nothing more will come."""
        os.replace(self.part, self.path)
        return self.path


def _has_git() -> bool:
    """Whether this is a checkout: a copy inside of another's would be given that one's commit."""
    top = _output("git", "rev-parse", "--show-toplevel")
    return bool(top) and Path(top).resolve() == Path(__file__).resolve().parents[1]


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _changes() -> str:
    """Empty if all tracked files are as committed, outside the results; else a name for how they differ."""
    changes = _output("git", "diff", "HEAD", "--", ":/", ":!/bench/results", ":!/experiments/results")
    return hashlib.sha256(changes.encode()).hexdigest()[:8] if changes else ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:
        return ""
