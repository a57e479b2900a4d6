"""How an activation tensor lies in memory, and the 1-bit ReLU mask that is kept in that order.

Neutral ground of all backends, so that one may run the backward of another's forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """(N, C, *spatial) as ``outer`` rows of ``inner`` contiguous elements for each index of ``channels``.

    ``channels_last``: outer = N * S rows of inner = C elements. Otherwise outer = N, inner = S, once for each channel.
    """

    channels_last: bool
    outer: int
    channels: int
    inner: int


def layout_of(x: Tensor) -> Layout:
    """The layout x is computed in: channels_last where its memory is, contiguous otherwise."""
    n, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
    if positions == 1 or (channels > 1 and x.stride(1) == 1 and _row_stride(x) is not None):
        return Layout(True, n * positions, channels, channels)
    return Layout(False, n, channels, positions)


def strides_in(x: Tensor, layout: Layout) -> tuple[int, int] | None:
    """(outer, channel) strides of x seen in ``layout``; None if its memory does not fit that layout."""
    if layout.channels_last:
        row_stride = _row_stride(x)
        return None if row_stride is None or (x.shape[1] > 1 and x.stride(1) != 1) else (row_stride, 1)
    return (x.stride(0), x.stride(1)) if _collapsed_stride(x, range(2, x.dim())) == 1 else None


def dense_strides(layout: Layout) -> tuple[int, int]:
    """(outer, channel) strides of a dense tensor."""
    return (layout.inner, 1) if layout.channels_last else (layout.channels * layout.inner, layout.inner)


def empty_in(layout: Layout, x: Tensor) -> Tensor:
    """A dense tensor like x with ``layout``'s memory order."""
    if not layout.channels_last:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = torch.empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=x.dtype, device=x.device)
    return rows.movedim(-1, 1)


def kept_in(x: Tensor, channels_last: bool) -> Tensor:
    """x, copied if its memory is not in the order it was in (saved-tensor hooks may give it back in another)."""
    shape = layout_of(x)
    if shape.channels_last == channels_last:
        return x
    positions = x.shape[2:].numel()
    return empty_in(Layout(channels_last, x.shape[0], x.shape[1], positions), x).copy_(x)


def bits_shape(layout: Layout) -> tuple[int, int]:
    """Shape of the mask of a tensor in that layout: each row of memory, padded to whole bytes."""
    rows = layout.outer if layout.channels_last else layout.outer * layout.channels
    return rows, (layout.inner + 7) // 8


def pack_bits(positive: Tensor, x: Tensor) -> Tensor:
    """A bool tensor of x's shape as uint8 of its ``bits_shape``: bit i of byte j is element 8 j + i of its row."""
    layout = layout_of(x)
    ordered = positive.movedim(1, -1) if layout.channels_last else positive
    rows = F.pad(ordered.reshape(-1, layout.inner), (0, -layout.inner % 8)).to(torch.int32)
    return (rows.unflatten(1, (-1, 8)) << torch.arange(8, device=x.device)).sum(2).to(torch.uint8)


def unpack_bits(bits: Tensor, x: Tensor) -> Tensor:
    """The bool tensor of x's shape that ``pack_bits`` packed."""
    layout = layout_of(x)
    rows = (bits.to(torch.int32).unsqueeze(2) >> torch.arange(8, device=x.device)) & 1
    ordered = rows.flatten(1)[:, : layout.inner] != 0
    if layout.channels_last:
        return ordered.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return ordered.reshape(x.shape)


def _row_stride(x: Tensor) -> int | None:
    """The stride between positions, if it is the same between all of them."""
    return _collapsed_stride(x, (0, *range(2, x.dim())), innermost=None)


def _collapsed_stride(x: Tensor, dims: tuple[int, ...] | range, innermost: int | None = 1) -> int | None:
    """The stride of ``dims`` seen as one dimension, if they can be (``innermost``: the stride it must have)."""
    stride = expected = innermost
    for dim in reversed(dims):
        if x.shape[dim] == 1:
            continue
        if expected is None:
            stride = expected = x.stride(dim)
        elif x.stride(dim) != expected:
            return None
        expected *= x.shape[dim]
    return 1 if stride is None else stride
