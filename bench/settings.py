"""Which launch settings of the Triton kernels are fastest on the GPU at hand: what ``config.SETTINGS`` comes from.

Every candidate runs on a few layers of each kind, captured in a CUDA graph, in turns with the others and a copy. Where
that GPU is not at hand, the model (``model.py``) says how long each should take.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from brn_kernels import node
from brn_kernels.backends import triton as kernels
from brn_kernels.backends.triton import config, launch
from brn_kernels.backends.triton.config import Settings

from .cases import DTYPES, Case, Layer
from .model import GPUS, predict
from .predict import about_predictions
from .record import machine
from .timing import captured, time_together

# warps, 16-byte accesses a thread, programs a multiprocessor
CANDIDATES = (
    (4, 4, 2), (4, 4, 3), (4, 4, 4), (4, 2, 4), (4, 2, 5), (4, 2, 6), (4, 1, 8), (8, 2, 2), (8, 2, 3), (8, 4, 1),
    (8, 1, 4),
)  # fmt: skip
SHAPES = ((256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7))
KINDS = (("channels_last", "bfloat16"), ("contiguous", "float32"))
OTHER_KINDS = (("channels_last", "float32"), ("contiguous", "bfloat16"))
PASSES = {"forward": 2, "backward": 5}
OF_TRIAL = ("direction", "layout", "dtype", "shape", "warps", "accesses", "programs")
MEASURED = ("p50_us", "percent_of_copy")
PREDICTED = ("predicted_us", "predicted_percent_of_copy", "spills")


@dataclass(frozen=True)
class Trial:
    """A direction of a layer of a kind, with settings."""

    direction: str
    layout: str
    dtype: str
    shape: tuple[int, ...]
    settings: Settings

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Its settings in the place of the library's."""
        before, smaller, resident = dict(config.SETTINGS), config._smaller, config._resident
        for direction, kind in before:
            if direction == self.direction:
                config.SETTINGS[direction, kind] = self.settings
        config._resident = lambda *_: None  # the settings are of what is not held
        config._smaller = lambda settings, _: settings  # just as they are, however many channels there are
        _forget()
        try:
            yield
        finally:
            config.SETTINGS.update(before)
            config._smaller, config._resident = smaller, resident
            _forget()

    def call(self) -> Callable[[], Any]:
        """The kernels of the direction on fresh tensors; ReLU follows."""
        shape, device = self.shape, torch.device("cuda")
        last = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        x = torch.empty(shape, dtype=DTYPES[self.dtype], device=device, memory_format=last).normal_()
        weight, bias = torch.ones(shape[1], device=device), torch.zeros(shape[1], device=device)
        if self.direction == "backward":
            dy = torch.empty_like(x).normal_()
            ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
            saved, bits = torch.stack([zeros, ones, ones, zeros]), None
            return lambda: kernels.backward(dy, x, None, None, weight, bias, saved, bits, "relu", True, False)
        statistics = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
        counter, clipped = torch.tensor(9, device=device), torch.zeros(shape[1], dtype=torch.bool, device=device)
        schedule = [3.0, 5.0, 0.0, 0.0, 0.0]
        return lambda: kernels.forward(
            x, None, None, weight, bias, *statistics, counter, clipped, None, schedule, 0.01, 1e-5, "relu"
        )

    def label(self) -> list[Any]:
        """The columns ``OF_TRIAL``."""
        chosen, shape = self.settings, "x".join(map(str, self.shape))
        return [self.direction, self.layout, self.dtype, shape, chosen.warps, chosen.accesses, chosen.programs]


def _forget() -> None:
    launch.forget()
    node.forget()


def trials(quick: bool) -> Iterator[list[Trial]]:
    """Those that are compared with each other, together."""
    kinds = KINDS if quick else KINDS + OTHER_KINDS
    for (layout, dtype), shape, direction in itertools.product(kinds, SHAPES, ("forward", "backward")):
        yield [Trial(direction, layout, dtype, shape, Settings(*candidate)) for candidate in CANDIDATES]


def run(out: Path, seconds: float, minutes: float, quick: bool) -> Path:
    """Measure all candidates; the CSV says microseconds and the percentage of a copy's speed.

    Args:
        out: the CSV.
        seconds: for each candidate and layer.
        minutes: after which no further layer begins.
        quick: the two main kinds only.
    """
    groups = list(trials(quick))
    limit = time.monotonic() + 60 * minutes
    _compile_side_by_side(list(itertools.chain(*groups)))
    about = machine(torch.device("cuda"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*OF_TRIAL, *MEASURED, *about])
        for group in tqdm(groups, unit="layer"):
            if time.monotonic() > limit:
                print("the time limit was reached")
                break
            writer.writerows([*row, *about.values()] for row in _measure(group, seconds))
            file.flush()
            torch.cuda.empty_cache()
    return out


def run_model(out: Path, gpu: str, quick: bool) -> Path:
    """Predict all candidates; what a run on that GPU will measure is left empty.

    Args:
        out: the CSV; ``spills``: instructions that touch local memory, which the model knows nothing of.
        gpu: one of ``model.GPUS``.
        quick: the two main kinds only.
    """
    about = about_predictions(gpu)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*OF_TRIAL, *PREDICTED, *MEASURED, *about])
        for group in tqdm(list(trials(quick)), unit="layer"):
            writer.writerows([*trial.label(), *_predicted(trial, gpu), "", "", *about.values()] for trial in group)
            file.flush()
    return out


def _predicted(trial: Trial, gpu: str) -> list[Any]:
    batch, channels, *size = trial.shape
    case = Case(Layer("", batch, channels, tuple(size), "relu"), trial.dtype, trial.layout)
    with trial.chosen():
        launched = predict(case, trial.direction, GPUS[gpu])
    seconds = sum(kernel.seconds for kernel in launched)
    percent = 100 * PASSES[trial.direction] * case.bytes / GPUS[gpu].copy / seconds
    return [f"{1e6 * seconds:.2f}", f"{percent:.1f}", sum(kernel.spills for kernel in launched)]


def _measure(group: list[Trial], seconds: float) -> list[list[Any]]:
    calls: dict[Any, Callable[[], Any]] = {}
    call = group[0].call()  # the same tensors for all
    for trial in group:
        with trial.chosen():
            try:
                calls[trial] = captured(lambda: call)
            except Exception as error:  # settings that do not fit the GPU are no candidates
                print(f"{trial.settings}: {error}")
    x = torch.empty(group[0].shape, dtype=DTYPES[group[0].dtype], device="cuda").normal_()
    calls["copy"] = captured(lambda: x.clone)
    times = time_together(calls, torch.device("cuda"), seconds * len(calls))
    copy = times.pop("copy").p50
    passes = PASSES[group[0].direction]
    return [
        [*trial.label(), f"{time.p50:.2f}", f"{100 * copy * passes / 2 / time.p50:.1f}"]
        for trial, time in times.items()
    ]


def _compile_side_by_side(them: list[Trial]) -> None:
    """Into Triton's cache on disk, by all cores: else compilation would take most of the time."""
    small = list(dict.fromkeys(replace(trial, shape=(32, *trial.shape[1:])) for trial in them))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(14, os.cpu_count() or 1), context) as pool:
        list(tqdm(pool.map(_compile, small, chunksize=8), total=len(small), unit="compilation", mininterval=5))


def _compile(trial: Trial) -> None:
    with trial.chosen(), contextlib.suppress(Exception):
        trial.call()()
