"""Results on disk, with all that one must know to read them."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    """Device, versions, commit and date."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain", "-uno") else ""),
        "date": str(datetime.date.today()),
    }


def processor() -> str:
    """The CPU's name, its cores, and the instruction set our loops use on it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {torch.ops.brn_kernels_native.instruction_set()}"


def write_csv(path: str, rows: Sequence[dict[str, Any]], device: str) -> None:
    """One line for each row, with what ``device`` they were measured on."""
    about = machine(device)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} | about)


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True).stdout.strip()
