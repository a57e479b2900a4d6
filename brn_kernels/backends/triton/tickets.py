"""Counters by which programs of one launch find out who is last: zero before and after it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

RESERVED = 2**18  # counters, 1 MB, for what is captured: 11 times ResNet-50's training step, float32, contiguous

_counters: dict[tuple[int | None, int], Tensor] = {}  # by device and stream
_outgrown: list[Tensor] = []  # kept: launches that wait on their stream still count in them
_reserves: dict[torch.device, Tensor] = {}  # what is left of each
_taking = threading.Lock()


def tickets(device: torch.device, count: int) -> Tensor:
    """``count`` zeroed counters (int32) that the launch must leave at zero.

    Launches on one stream run one after another and may share them; so each stream has its own. A CUDA graph may be
    replayed on any stream, beside whatever runs then: each call in it gets counters of its own. They come from a
    reserve made at the first call that is not captured, and are never given back; when that is used up, or was never
    made, they are zeroed in the graph, which takes a launch.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        with _taking:
            return _of_reserve(device, count)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    counters = _counters.get(key)
    return counters if counters is not None and counters.numel() >= count else _more(device, key, count)


def _more(device: torch.device, key: tuple[int | None, int], count: int) -> Tensor:
    with _taking:
        counters = _counters.get(key)
        if counters is None or counters.numel() < count:
            if counters is not None:
                _outgrown.append(counters)
            counters = _counters[key] = _lasting_zeros(device, max(count, 4096))
            if device not in _reserves:
                _reserves[device] = _lasting_zeros(device, RESERVED)
        return counters


def _of_reserve(device: torch.device, count: int) -> Tensor:
    reserve = _reserves.get(device)
    if reserve is None or reserve.numel() < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _reserves[device] = reserve[(count + 3) // 4 * 4 :]  # 16-byte aligned
    return reserve[:count]


def _lasting_zeros(device: torch.device, count: int) -> Tensor:
    """Zeros that may outlive whatever memory pool this thread allocates from, and are there for every stream.

    While ``torch.compile(mode="reduce-overhead")`` warms up, what a thread allocates belongs to its graphs' pool, and
    is used again when they are replayed. That is so for each thread apart: another one allocates as usual. It waits for
    a stream of its own only, not for what this one has queued.
    """

    def make() -> Tensor:
        stream = torch.cuda.Stream(device, priority=-1)  # of a pool that few use
        with torch.cuda.stream(stream):
            zeros = torch.zeros(count, dtype=torch.int32, device=device)
        stream.synchronize()
        return zeros

    with ThreadPoolExecutor(1) as another:
        return another.submit(make).result()
