"""How the tensors of a call lie in memory, as the compiled backends see it: in the layout of x, by two strides each.

What follows from shapes and strides alone is found once: training repeats them, and small layers are host-bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import layout
from .layout import Layout


@dataclass(frozen=True, eq=False)  # each is found again by what it is made of, and hashed by its identity
class Memory:
    """The memory of x, of other tensors of its shape, and of ``torch.empty_like(x)``, in turn.

    ``strides`` are (outer, channel) of each. The channel stride is 0 in channels_last, where channels are columns of a
    row. Those of a tensor that is absent stand in nobody's way.
    """

    layout: Layout
    strides: tuple[tuple[int, int], ...]
    fits: bool  # else some of them must be copied first, and the strides mean nothing


def memory_of(x: Tensor, *others: Tensor | None) -> Memory:
    """The memory of x, others and ``torch.empty_like(x)``, seen in the layout of x."""
    found = _memory(x.shape, x.stride(), *[None if t is None else t.stride() for t in others])
    return found if all(map(_holds_its_values, (x, *others))) else replace(found, fits=False)


@functools.lru_cache(maxsize=4096)
def _memory(shape: torch.Size, *strides: tuple[int, ...] | None) -> Memory:
    tensors = [None if each is None else torch.empty_strided(shape, each, device="meta") for each in strides]
    assert tensors[0] is not None
    seen_as = layout.layout_of(tensors[0])
    found = [_strides(t, seen_as) for t in (*tensors, torch.empty_like(tensors[0]))]
    return Memory(seen_as, tuple((0, 0) if each is None else each for each in found), None not in found)


def _strides(tensor: Tensor | None, seen_as: Layout) -> tuple[int, int] | None:
    """None if the memory does not fit the layout."""
    if tensor is None:
        return 0, 0 if seen_as.channels_last else seen_as.inner
    found = layout.strides_in(tensor, seen_as)
    return (found[0], 0) if found is not None and seen_as.channels_last else found


def copied(tensor: Tensor, seen_as: Layout) -> Tensor:
    """A dense copy in the layout."""
    return layout.empty_in(seen_as, tensor).copy_(tensor)


def forward_of_copies(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor | None]], x: Tensor, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``forward`` of a call whose memory does not fit: what does not is copied."""
    seen_as, source = _fitting_x(x)
    y, saved, bits = forward(source, _fitting(residual, seen_as), *rest)
    return y if source is x else torch.empty_like(x).copy_(y), saved, bits


def backward_of_copies(
    backward: Callable[..., tuple[Tensor | None, Tensor, Tensor, Tensor | None]],
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """``backward``, likewise."""
    seen_as, source = _fitting_x(x)
    dx, dweight, dbias, dresidual = backward(_fitting(dy, seen_as), source, _fitting(residual, seen_as), *rest)
    if source is not x:
        dx, dresidual = (None if t is None else torch.empty_like(x).copy_(t) for t in (dx, dresidual))
    return dx, dweight, dbias, dresidual


def _fitting_x(x: Tensor) -> tuple[Layout, Tensor]:
    """The layout, and x, or a copy if its memory, or that of what is computed from it, does not fit."""
    memory = memory_of(x)
    return memory.layout, x if memory.fits else copied(x, memory.layout)


def _fitting(tensor: Tensor | None, seen_as: Layout) -> Tensor | None:
    if tensor is None or (_strides(tensor, seen_as) is not None and _holds_its_values(tensor)):
        return tensor
    return copied(tensor, seen_as)


def _holds_its_values(tensor: Tensor | None) -> bool:
    """Whether its memory does: that of ``z.conj().imag`` holds their negatives."""
    return tensor is None or not (tensor.is_neg() or tensor._is_zerotensor())


def dense(values: Tensor | None) -> Tensor | None:
    """Small tensors as the kernels read them: one value after the other."""
    return None if values is None else values.contiguous()


def copy_back(updated: tuple[tuple[Tensor | None, Tensor | None], ...]) -> None:
    """For each (dense, original): bring the values back where ``dense`` had to make a copy."""
    for ours, theirs in updated:
        if ours is not None and theirs is not None and ours is not theirs:
            theirs.copy_(ours)
