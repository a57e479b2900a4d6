"""Tensors as the compiled backends see them: memory in the layout of the call, and its two strides."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import layout
from .layout import Layout


class Side(NamedTuple):
    """A tensor whose memory fits the layout of the call, with its (outer, channel) strides there.

    The channel stride is 0 in channels_last, where channels are columns of a row. The strides of no tensor are such as
    stand in nobody's way.
    """

    tensor: Tensor | None
    strides: tuple[int, int]

    def copy_to(self, wanted: Tensor) -> None:
        """Bring the values to the tensor they were wanted in, if they are not written there already."""
        if self.tensor is not None and self.tensor is not wanted:
            wanted.copy_(self.tensor)


def readable(tensor: Tensor | None, shape: Layout) -> Side:
    """The tensor, or a dense copy of it in the layout of the call if its memory does not fit that."""
    side = writable(tensor, shape)
    if tensor is not None and side.tensor is not None and side.tensor is not tensor:
        side.tensor.copy_(tensor)
    return side


def writable(tensor: Tensor | None, shape: Layout) -> Side:
    """The tensor, or a dense one to be copied from if its memory does not fit the layout of the call."""
    if tensor is None:
        return Side(None, (0, 0 if shape.channels_last else shape.inner))
    strides = _strides(tensor.shape, tensor.stride(), shape)
    return Side(layout.empty_in(shape, tensor), _dense_strides(shape)) if strides is None else Side(tensor, strides)


def layout_of(x: Tensor) -> Layout:
    """``layout.layout_of``, found once for each shape and strides."""
    return _layout(x.shape, x.stride())


def dense(values: Tensor | None) -> Tensor | None:
    """Values per channel as the kernels read them: one after the other."""
    return None if values is None else values.contiguous()


def copy_back(updated: tuple[tuple[Tensor | None, Tensor | None], ...]) -> None:
    """For each (dense, original): bring the values back where ``dense`` had to make a copy."""
    for ours, theirs in updated:
        if ours is not None and theirs is not None and ours is not theirs:
            theirs.copy_(ours)


# What follows from shapes and strides alone is found once: training repeats them, and small layers are host-bound.


@functools.lru_cache(maxsize=4096)
def _layout(shape: torch.Size, strides: tuple[int, ...]) -> Layout:
    return layout.layout_of(torch.empty_strided(shape, strides, device="meta"))


@functools.lru_cache(maxsize=4096)
def _strides(shape: torch.Size, strides: tuple[int, ...], seen_as: Layout) -> tuple[int, int] | None:
    found = layout.strides_in(torch.empty_strided(shape, strides, device="meta"), seen_as)
    return (found[0], 0) if found is not None and seen_as.channels_last else found


def _dense_strides(shape: Layout) -> tuple[int, int]:
    outer, channel = layout.dense_strides(shape)
    return outer, 0 if shape.channels_last else channel
