"""Triton kernels: the fast path on NVIDIA GPUs. Under ``TRITON_INTERPRET=1`` they run, slowly, on CPUs."""

from __future__ import annotations

import torch
import triton

from .launch import apply, backward, backward_in_cpp, forward, forward_in_cpp, is_fused

__all__ = ["apply", "backward", "backward_in_cpp", "forward", "forward_in_cpp", "is_fused", "unusable"]


def unusable(device_type: str) -> str | None:
    """Why the kernels cannot run on that type of device; None if they can."""
    if triton.knobs.runtime.interpret:
        return None if device_type == "cpu" else "TRITON_INTERPRET is set: kernels run on the CPU only"
    if device_type != "cuda" or torch.version.hip is not None:
        return f"its kernels run on NVIDIA GPUs, not on {device_type} (TRITON_INTERPRET=1 interprets them there)"
    return None
