"""What Nsight Compute says of the kernels: bytes moved, bandwidth, and what warps wait for."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import brn_kernels as brn

from .record import machine

FIRST_KERNELS = ("stream_kernel", "resident_forward_kernel")  # of a forward
KERNELS = (
    *FIRST_KERNELS, "repair_kernel", "reduce_kernel", "apply_kernel", "alone_kernel", "resident_backward_kernel",
)  # fmt: skip


@dataclass(frozen=True)
class Profiled:
    """A layer, ReLU included. With closed limits every channel is repaired, with open ones hardly any."""

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    closed: bool = False
    residual: bool = False

    def __str__(self) -> str:
        megabytes = math.prod(self.shape) * getattr(torch, self.dtype).itemsize / 1e6
        layout = "channels_last" if self.channels_last else "contiguous"
        what = f"{', residual' if self.residual else ''}{', limits closed' if self.closed else ''}"
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {layout}{what} ({megabytes:.0f} MB a pass)"

    def step(self) -> Callable[[], None]:
        """Its forward and backward, on tensors on the GPU."""
        schedule = brn.ClipSchedule.batchnorm() if self.closed else brn.ClipSchedule.constant(3, 5)
        norm = brn.BatchRenorm2d(self.shape[1], schedule=schedule, activation="relu").cuda()
        last = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="cuda", memory_format=last).normal_()
        dy = torch.empty_like(x).normal_()
        residual = torch.empty_like(x).normal_().requires_grad_() if self.residual else None
        x.requires_grad_()
        return lambda: norm(x, residual).backward(dy)


LAYERS = (
    Profiled((256, 256, 56, 56), "bfloat16", True), Profiled((256, 256, 56, 56), "float32", False),
    Profiled((256, 1024, 14, 14), "bfloat16", True), Profiled((256, 2048, 7, 7), "float32", False),
    Profiled((256, 256, 56, 56), "bfloat16", True, residual=True),
    Profiled((256, 256, 56, 56), "bfloat16", True, closed=True),
    Profiled((256, 1024, 14, 14), "bfloat16", True, closed=True),
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


COLUMNS = ("layer", "kernel", *METRICS.values(), "GB_per_s")


def run(out: Path) -> Path:
    """Profile a forward and a backward of each layer; one row a kernel, waits in warps for each instruction issued.

    Raises:
        ValueError: there is no ncu, or it fails.
    """
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        raise ValueError("Nsight Compute (ncu) is not installed")
    rows = parse(_profiled(ncu))
    about = machine(torch.device("cuda"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    return out


def _profiled(ncu: str) -> str:
    """What ncu prints; without the metrics that this version or GPU has not."""
    metrics = list(METRICS)
    while True:
        command = [
            ncu, "--csv", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name",
            f"regex:^({'|'.join(KERNELS)})", "--metrics", ",".join(metrics), sys.executable, "-m", "bench.profile",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ, check=False
        )
        said = done.stdout + done.stderr
        if done.returncode == 0 and '\n"ID"' in "\n" + done.stdout:
            return done.stdout
        unknown = [name for name in metrics if re.search(rf"(?i)(?:metric|find|unknown).*{re.escape(name)}", said)]
        if not unknown or len(unknown) == len(metrics):
            raise ValueError(f"ncu failed: {said[-2000:]}")
        print(f"ncu does not know {', '.join(unknown)}", file=sys.stderr)
        metrics = [name for name in metrics if name not in unknown]


def parse(said: str) -> list[dict[str, str]]:
    """A row for each kernel, from what ncu and the profiled program print. What ncu could not measure stays "n/a"."""
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    kernels: dict[int, dict[str, str]] = defaultdict(dict)
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))):
        column = METRICS.get(row["Metric Name"])
        kernels[int(row["ID"])]["kernel"] = row["Kernel Name"]
        if column is not None:
            kernels[int(row["ID"])][column] = _value(row["Metric Value"], row["Metric Unit"])
    labels = [line.removeprefix("layer: ") for line in lines if line.startswith("layer: ")]
    found, layer = [], -1
    for _, row in sorted(kernels.items()):
        layer += row["kernel"].startswith(FIRST_KERNELS)
        moved = [row.get(name, "") for name in ("MB_read", "MB_written", "us")]
        try:
            read, written, us = map(float, moved)
            speed = f"{1e3 * (read + written) / us:.4g}"
        except ValueError:
            speed = "n/a"
        found.append({"layer": labels[layer] if layer < len(labels) else ""} | row | {"GB_per_s": speed})
    return found


def _value(text: str, unit: str) -> str:
    try:
        return f"{float(text.replace(',', '')) * UNITS.get(unit, 1.0):.4g}"
    except ValueError:
        return text


def main() -> None:
    """What ncu runs: each layer once to warm up, once profiled."""
    for layer in LAYERS:
        step = layer.step()
        print(f"layer: {layer}", flush=True)
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
