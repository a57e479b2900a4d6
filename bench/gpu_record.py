"""What ``gpu_check.sh`` writes down: ``run.json``, and all of a folder in one file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|warnings?)\b")
SUMMARY = re.compile(r"(?:^|[ =])\d+ (?:passed|failed|skipped|errors?)\b")


def machine(folder: Path) -> None:
    """Begin, or go on with, a record: on what, of what, when."""
    from .record import commit  # imports torch, which nothing else here needs

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    about = {
        "device": _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "pytest")},
        "nvcc": _release("nvcc"), "ncu": _release("ncu"), "compute-sanitizer": _release("compute-sanitizer"),
        **commit(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    record = _read(folder)
    _write(folder, record | {"calls": [*record.get("calls", []), about]})


def step(folder: Path, name: str, result: str, seconds: str) -> None:
    """Note the result of a step; a later one of the same name takes its place."""
    log = folder / f"{name}.log"
    record = _read(folder)
    entry = {"result": result, "seconds": int(seconds)} | counts(
        log.read_text(errors="replace") if log.exists() else ""
    )
    _write(folder, record | {"steps": record.get("steps", {}) | {name: entry}})


def counts(log: str) -> dict[str, int]:
    """How many tests passed, failed and so on, by pytest's last line; nothing if it never came."""
    line = next((line for line in reversed(log.splitlines()) if SUMMARY.search(line)), "")
    return {what.removesuffix("s"): int(n) for n, what in COUNT.findall(line)}


def pack(folder: Path) -> Path:
    """All of the folder in one compressed file beside it."""
    packed = folder.with_name(folder.name + ".tgz")
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, folder.name)
    return packed


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(folder: Path, record: dict[str, Any]) -> None:
    new = folder / "run.json.new"
    new.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(new, folder / "run.json")


def _release(tool: str) -> str:
    """The version that a tool of CUDA's says it has."""
    path = shutil.which(tool) or shutil.which(f"/usr/local/cuda/bin/{tool}")
    found = re.search(r"(?:release|[Vv]ersion) (\d[\w.]*)", _said(path, "--version")) if path else None
    return found[1] if found else ""


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    {"machine": machine, "step": step, "pack": pack}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
