"""Times that can be compared: the calls take turns, in another order each round, each with caches flushed.

On a GPU CUDA events are read; small calls are also captured in a CUDA graph and its replays timed.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MAX_ROUNDS, MIN_ROUNDS = 60, 5
HOST_CALLS = 200
HEAD_START = 3_000_000  # cycles, some 2 ms
MAX_HEAD_START = 16 * HEAD_START
OWN_CACHES = 2**22  # bytes; more than a core's first and second level hold


@dataclass(frozen=True)
class Times:
    """Quantiles over the rounds, in microseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(1e6 * tenths[1], 1e6 * tenths[4], 1e6 * tenths[7])


def time_together(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, *, host_counts: bool = False
) -> dict[str, Times]:
    """Time the calls in turns, for about so many seconds in all.

    Args:
        calls: what to time; each is called several times before.
        device: where they run.
        seconds: spent in all; at least ``MIN_ROUNDS`` rounds are made, at most ``MAX_ROUNDS``.
        host_counts: a GPU that waits for the host is part of what is measured, as of a whole network.
    """
    for call in calls.values():
        call()
    flush = _flusher(device)
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle  # nobody always follows the same one
    stopwatches = {name: _GpuStopwatch(host_counts) if device.type == "cuda" else _seconds_on_cpu for name in calls}
    started = time.perf_counter()
    for done in range(MAX_ROUNDS + 1):
        shuffle(order)
        for name in order:
            elapsed = stopwatches[name](calls[name], flush)
            if done > 0:  # the first round warms up
                found[name].append(elapsed)
        if done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
    return {name: Times.of(values) for name, values in found.items()}


def host_times(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, Times]:
    """What a call costs the host, which does not wait for the device; calls on the smallest tensors."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(HOST_CALLS // 10):
            call()
        for done in range(HOST_CALLS):
            if done % 20 == 0:
                _synchronize(device)  # or its queue fills up
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    _synchronize(device)
    return {name: Times.of(values) for name, values in found.items()}


def captured(make: Callable[[], Callable[[], Any]]) -> Callable[[], None]:
    """The call that ``make`` returns, as a CUDA graph; made on the capturing stream, where its backward then runs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most memory a call holds at once beyond what was held before; what it returns is included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with _silent_stderr(), torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        result = call()
    del result
    held = peak = 0
    assert profile.kineto_results is not None
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Some builds of the profiler write to the process's stderr, across a progress bar."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _seconds_on_cpu(call: Callable[[], Any], flush: Callable[[], Any]) -> float:
    flush()
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


class _GpuStopwatch:
    """Seconds between two CUDA events. The host gets a head start: as in training, its time does not count.

    If the GPU has caught up before all is queued, the time between the events holds some of the host's, and it is
    measured again with twice the head start; unless that is long already, because the call waits for the GPU itself.

    Args:
        host_counts: take every time as it is.
    """

    def __init__(self, host_counts: bool) -> None:
        self.host_counts = host_counts
        self.head_start = HEAD_START

    def __call__(self, call: Callable[[], Any], flush: Callable[[], Any]) -> float:
        while True:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush()
            torch.cuda._sleep(self.head_start)
            start.record()
            result = call()
            end.record()
            caught_up = start.query()
            end.synchronize()
            del result
            if self.host_counts or not caught_up or self.head_start >= MAX_HEAD_START:
                return start.elapsed_time(end) / 1e3
            self.head_start *= 2


def _flusher(device: torch.device) -> Callable[[], Any]:
    """Writes twice what a GPU's L2 holds; of CPUs the cores' own caches.

    A CPU's shared cache is left alone: in training the convolution before has just written x there, and the interpreter
    lives in it too, so that emptying it would measure Python more than anything else.
    """
    if device.type == "cuda":
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    else:
        size = torch.get_num_threads() * OWN_CACHES
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
