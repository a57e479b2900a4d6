"""What Nsight Compute says of the kernels: bytes moved, bandwidth, and what warps wait for."""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import brn_kernels as brn

from .record import machine

KERNELS = ("stream_kernel", "repair_kernel", "reduce_kernel", "apply_kernel", "alone_kernel")
LAYERS = (
    ((256, 256, 56, 56), "bfloat16", True), ((256, 256, 56, 56), "float32", False),
    ((256, 1024, 14, 14), "bfloat16", True), ((256, 2048, 7, 7), "float32", False),
)  # fmt: skip
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "MB_read",
    "dram__bytes_write.sum": "MB_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_dram_peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "percent_of_warps",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "percent_of_issue_slots",
    "launch__registers_per_thread": "registers",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "waits_for_memory",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "waits_at_barriers",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio": "waits_to_issue_memory",
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio": "waits_at_fences",
}
UNITS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}


def run(out: Path) -> Path:
    """Profile a forward and a backward of each layer; one row a kernel, waits in warps for each instruction issued.

    Raises:
        ValueError: there is no ncu, or it fails.
    """
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        raise ValueError("Nsight Compute (ncu) is not installed")
    command = [
        ncu, "--csv", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name",
        f"regex:^({'|'.join(KERNELS)})", "--metrics", ",".join(METRICS), sys.executable, "-m", "bench.profile",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ, check=False
    )
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if done.returncode or start is None:
        raise ValueError(f"ncu failed: {(done.stdout + done.stderr)[-2000:]}")
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        value = float(row["Metric Value"].replace(",", "")) * UNITS.get(row["Metric Unit"], 1.0)
        rows[row["ID"]] |= {"kernel": row["Kernel Name"], METRICS[row["Metric Name"]]: f"{value:.4g}"}
    labels = [line.removeprefix("layer: ") for line in lines if line.startswith("layer: ")]
    about = machine(torch.device("cuda"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["layer", "kernel", *METRICS.values(), *about], lineterminator="\n")
        writer.writeheader()
        layer = -1
        for _, row in sorted(rows.items(), key=lambda pair: int(pair[0])):
            layer += row["kernel"].startswith("stream_kernel")
            writer.writerow({"layer": labels[layer] if layer < len(labels) else ""} | row | about)
    return out


def _layer(shape: tuple[int, ...], dtype: str, channels_last: bool) -> Callable[[], None]:
    norm = brn.BatchRenorm2d(shape[1], schedule=brn.ClipSchedule.constant(3, 5), activation="relu").cuda()
    last = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda", memory_format=last).normal_().requires_grad_()
    dy = torch.empty_like(x).normal_()
    return lambda: norm(x).backward(dy)


def main() -> None:
    """What ncu runs: each layer once to warm up, once profiled."""
    for shape, dtype, channels_last in LAYERS:
        step = _layer(shape, dtype, channels_last)
        megabytes = math.prod(shape) * getattr(torch, dtype).itemsize / 1e6
        layout = "channels_last" if channels_last else "contiguous"
        print(f"layer: {'x'.join(map(str, shape))} {dtype} {layout} ({megabytes:.0f} MB a pass)", flush=True)
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
