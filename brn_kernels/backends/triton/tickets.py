"""Counters by which programs of one launch find out who is last, or what to do next: zero before and after it."""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """``count`` zeroed counters (int32) that the launch must leave at zero.

    Launches on one stream run one after another and may share them; so each stream has its own. A CUDA graph may be
    replayed on any stream, beside whatever runs then: each call in it gets counters of its own, zeroed in the graph.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    counters = _counters.get(key)
    if counters is None or counters.numel() < count:
        counters = _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return counters
