"""A run: all its jobs in the order of their importance, with progress and a time limit."""

from __future__ import annotations

import functools
import itertools
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from brn_kernels import node

from . import layers, training
from .cases import ALL_FORMATS, CHANNELS, DIRECTIONS, HOST, LAYOUTS, SIZES, Case, Plan
from .networks import NETWORKS
from .record import RESULTS, Recorder, machine
from .training import MODES, Training, trainings

NETS_TRAINED = ("ResNet-50", "ResNeXt-101", "EfficientNet-B0", "U-Net 2d")


@dataclass(frozen=True)
class Level:
    """How much a run measures."""

    plan: Plan
    trained: Sequence[Training]
    seconds: float  # for each candidate of a case in each direction
    minutes: float  # after which no further job begins
    compile_peers: bool = True


def levels(device_type: str) -> dict[str, Level]:
    """The levels, for GPUs or for CPUs: a CPU is some 100 times slower and gets smaller batches and fewer layers."""
    fp32, bf16 = ("float32", "contiguous"), ("bfloat16", "channels_last")
    tiny = Level(
        Plan(("ResNet-50",), layers=1, divisor=128, formats=(fp32,), states=("clip 10",), state_layers=1, peer_layers=1,
             largest=2**12, channels_bytes=2**16),
        [Training("U-Net 2d", *fp32, "eager", sample=(3, 32, 32), batch=2)],
        seconds=0.0, minutes=5, compile_peers=False,
    )  # fmt: skip
    if device_type == "cpu":
        small = {"sample": (3, 64, 64), "batch": 4}
        larger = {"sample": (3, 96, 96), "batch": 16}  # as much work as three images of 224 x 224
        full = Level(
            Plan(layers=8, other_layers=4, divisor=16,
                 formats=tuple(itertools.product(("float32", "bfloat16"), LAYOUTS)), state_layers=1, peer_layers=3,
                 largest=2**28),
            trainings(NETS_TRAINED, (fp32,), ("eager",), **small)
            + trainings(("ResNet-50", "EfficientNet-B0"), (fp32,), ("eager",), **larger)
            + trainings(("ResNet-50",), (fp32,), ("compiled",), **small)
            + trainings(("ResNet-50",), (fp32,), ("compiled",), **larger),
            seconds=0.06, minutes=25,
        )  # fmt: skip
        quick = Level(
            Plan(("ResNet-50",), layers=4, divisor=32, states=("closed", "clip 10"), state_layers=1, peer_layers=2,
                 largest=2**24, size_step=16, channels_bytes=2**22),
            trainings(("ResNet-50", "U-Net 2d"), (fp32,), ("eager",), **small),
            seconds=0.04, minutes=2.25,
        )  # fmt: skip
        everything = replace(full, plan=Plan(divisor=16, formats=ALL_FORMATS, largest=2**30), minutes=600)
    else:
        full = Level(
            Plan(other_layers=8),
            trainings(NETS_TRAINED[:1], (bf16, fp32), MODES)
            + trainings(NETS_TRAINED[1:], (bf16, fp32), ("eager", "graph")),
            seconds=0.03, minutes=7.5,
        )  # fmt: skip
        quick = Level(
            Plan(("ResNet-50",), layers=6, states=("closed", "clip 10"), state_layers=2, peer_layers=2, size_step=16),
            trainings(("ResNet-50",), (bf16,), ("eager",)),
            seconds=0.02, minutes=1.4,
        )  # fmt: skip
        everything = Level(
            Plan(formats=ALL_FORMATS, size_step=2), trainings(tuple(NETWORKS), (bf16, fp32), MODES),
            seconds=0.1, minutes=600,
        )  # fmt: skip
    return {"quick": quick, "full": full, "everything": everything, "tiny": tiny}


@dataclass
class Job:
    """Something that gives rows; ``name`` is what a resumed run knows it by."""

    name: str
    measure: Callable[[], list[dict[str, Any]]]


def jobs(level: Level, device: torch.device) -> list[Job]:
    """In the order of their importance: a run that is cut off has what is asked first."""
    keywords = {"directions": DIRECTIONS, "seconds": level.seconds, "compile_peers": level.compile_peers}
    found = []
    for case in level.plan.cases():
        job = Job(str(case), functools.partial(layers.measure, case, device, **keywords))
        found.append((_rank_of_layer(case, level.plan.nets[0]), job))
    for training_case in level.trained:
        measure = functools.partial(training.measure, training_case, device, seconds=10 * level.seconds)
        found.append((_rank_of_training(training_case, level.plan.nets[0]), Job(str(training_case), measure)))
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def _rank_of_layer(case: Case, first_net: str) -> int:
    """The first network's layers, with open limits and then with closed ones, the sweeps, the other networks'."""
    if case.layer.net in (SIZES, CHANNELS):
        return 3
    if case.layer.net not in (HOST, first_net):
        return 6
    return {"open": 0, "closed": 1}.get(case.state, 4)


def _rank_of_training(case: Training, first_net: str) -> int:
    """Between a first network's layers and the sweeps, its training; what must be compiled comes last."""
    if case.mode == "compiled":
        return 8
    if case.net != first_net:
        return 7
    return 2 if case.mode == "eager" else 5


def default_path(about: dict[str, str]) -> Path:
    """The CSV's name: device, level, commit."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return RESULTS / f"{device}-{about['level']}-{about['commit'] or 'unknown'}{'-dirty' if about['dirty'] else ''}.csv"


class TimeLimit(Exception):
    """The limit was reached with cases left; what was measured is in the started file."""


def run(name: str, device: torch.device, *, out: Path | None, minutes: float | None, fresh: bool) -> Path:
    """Measure a level; returns the finished CSV.

    ``minutes``: after which no further job begins, None for the level's; 0 finishes the file with what is there, and
    says in it what is not.

    Raises:
        TimeLimit: see there.
        FileExistsError: see ``Recorder``.
        WrongResults: our results are wrong; what was measured before stays in the started file.
    """
    level = levels(device.type)[name]
    about = {"level": name} | machine(device)
    if node.module() is None:
        print("calls are in Python: `brn build` compiles them, and the host's time is less", file=sys.stderr)
    recorder = Recorder(out or default_path(about), about, fresh)
    before = set(recorder.done)
    todo = [job for job in jobs(level, device) if job.name not in before]
    if before:
        print(f"going on: {len(before)} of {len(before) + len(todo)} cases are there", file=sys.stderr)
    limit = time.monotonic() + 60 * (level.minutes if minutes is None else minutes)
    progress = tqdm(todo, unit="case", dynamic_ncols=True, smoothing=0.05)
    for number, job in enumerate(progress):
        if minutes == 0:
            recorder.add(job.name, [{"part": "none", "net": job.name, "error": "not reached in the time limit"}])
            continue
        if time.monotonic() > limit:
            progress.close()
            raise TimeLimit(
                f"{len(todo) - number} of {len(todo) + len(before)} cases left; {recorder.part} has the others"
            )
        progress.set_description(job.name[:60].ljust(60))
        try:
            rows = job.measure()
        except torch.OutOfMemoryError as error:
            rows = [{"part": "none", "net": job.name, "error": str(error).partition("\n")[0][:200]}]
        except RuntimeError as error:
            if "not enough memory" not in str(error):  # how a CPU's allocator says it
                raise
            rows = [{"part": "none", "net": job.name, "error": "not enough memory"}]
        recorder.add(job.name, rows or [{"part": "none", "net": job.name, "error": "gave nothing"}])
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return recorder.finish()
