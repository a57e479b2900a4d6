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


def time_together(calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, Times]:
    """Time the calls in turns, for about so many seconds in all.

    Args:
        calls: what to time; each is called several times before.
        device: where they run.
        seconds: spent in all; at least ``MIN_ROUNDS`` rounds are made, at most ``MAX_ROUNDS``.
    """
    for call in calls.values():
        call()
    flush = _flusher(device)
    stopwatch = _seconds_on_gpu if device.type == "cuda" else _seconds_on_cpu
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle  # nobody always follows the same one
    started = time.perf_counter()
    for done in range(MAX_ROUNDS + 1):
        shuffle(order)
        for name in order:
            elapsed = stopwatch(calls[name], flush)
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


def _seconds_on_gpu(call: Callable[[], Any], flush: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush()
    torch.cuda._sleep(HEAD_START)  # as in training, the host gets ahead: else its time would be measured
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


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
