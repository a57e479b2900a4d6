"""What forward and backward kernels share: finding a tile in memory, merging statistics, activations, packed bits.

Names: ``_ptr`` a pointer argument, ``p_`` a pointer, ``b_`` a block of values, ``o_`` offsets, ``m_`` a mask. Shapes in
comments: OUTER x INNER is the tile, CT the channels of a channel tile, COLUMNS the columns with a channel of their own
(INNER, or 1 where all have the same), ROWS x COLUMNS the groups of a tile, each of which one thread reduces alone.

A channel tile is, by CHANNELS_LAST and CT:

    True, INNER: a column is a channel (channels_last)
    False, 1:    all columns are positions of one channel (contiguous)
    True, fewer: planes of CT channels lie side by side in a row (contiguous, for accesses of 16 bytes where ``plane``,
                 the positions of a channel, is no multiple of that); columns after the last plane are empty
"""

import triton
import triton.language as tl

# Sizes and strides of every kernel. Nothing is compiled anew for their values: what a kernel must know of them (by how
# much rows and columns divide) it is told by VECTOR, so that all layers of a kind share one compilation.
SIZES = (
    "outer_size", "channels", "inner_v", "chunks", "items", "bundle", "padded", "row_bytes", "plane",
    "x_outer_v", "x_channel_v", "y_outer_v", "y_channel_v", "residual_outer_v", "residual_channel_v",
    "dy_outer_v", "dy_channel_v", "dx_outer_v", "dx_channel_v", "dresidual_outer_v", "dresidual_channel_v",
    "hold", "r_ramp", "d_ramp",
)  # fmt: skip

# An activation as the kernels know it.
NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
SILU = tl.constexpr(3)
HARDSWISH = tl.constexpr(4)
ACTIVATION_CODES = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "hardswish": 4}
_SLOPE = tl.constexpr(0.01)  # reference.LEAKY_RELU_SLOPE


@triton.jit
def number(value, ACC: tl.constexpr):
    """A scalar argument in the arithmetic's dtype (a cast of a float argument loses digits in the interpreter)."""
    return tl.full([], value, ACC)


@triton.jit
def channels_of(columns, tile, plane, CHANNELS_LAST: tl.constexpr, INNER: tl.constexpr, CT: tl.constexpr):
    """The channels of a tile's columns 0 to INNER - 1, or of its only channel; some beyond the last."""
    if not CHANNELS_LAST:
        return tile + columns * 0
    elif CT == INNER:
        return tile * INNER + columns
    else:
        return tile * CT + tl.minimum(columns // plane, CT - 1)


@triton.jit
def belongs(plane, INNER: tl.constexpr, CT: tl.constexpr):
    """(CT, INNER): which columns belong to which channel where planes lie side by side."""
    return (tl.arange(0, INNER) // plane)[None, :] == tl.arange(0, CT)[:, None]


@triton.jit
def over_planes(b, plane, INNER: tl.constexpr, CT: tl.constexpr):
    """(INNER,) summed over the columns of each channel, (CT,)."""
    return tl.sum(tl.where(belongs(plane, INNER, CT), b[None, :], 0.0), 1)


@triton.jit
def across_planes(b, plane, INNER: tl.constexpr, CT: tl.constexpr):
    """(CT,) to the columns of each channel, (INNER,)."""
    return tl.sum(tl.where(belongs(plane, INNER, CT), b[:, None], 0.0), 0)


@triton.jit
def locate(
    item, tile, chunks, outer_size, inner_v, plane, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Where a work item lies: its first row, in 64 bits, rows from there, columns, and which of its elements exist.

    Shapes (), (OUTER, 1), (1, INNER), (OUTER, INNER). None exist of an item beyond the last.
    """
    rows, columns = tl.arange(0, OUTER), tl.arange(0, INNER)
    inner_size = inner_v * VECTOR
    if CHANNELS_LAST:
        first_row = tl.cast(item, tl.int64) * OUTER
        if CT == INNER:
            columns += tile * INNER
        else:
            columns += tl.multiple_of(tile * (CT * plane), VECTOR)
            inner_size = tl.multiple_of((tile + 1) * (CT * plane), VECTOR)
    else:
        first_row = tl.cast(item // chunks, tl.int64) * OUTER
        columns += (item % chunks) * INNER
    rows, columns = rows[:, None], columns[None, :]
    return first_row, rows, columns, rows_exist(first_row, rows, outer_size, OUTER) & (columns < inner_size)


@triton.jit
def rows_exist(first_row, rows, outer_size, OUTER: tl.constexpr):
    """Which rows of a work item exist."""
    return rows < tl.cast(tl.minimum(outer_size - first_row, OUTER), tl.int32)


@triton.jit
def pointers(
    ptr, first_row, rows, columns, tile, outer_stride_v, channel_stride_v, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Where a work item lies in a tensor. Strides come divided by VECTOR: it is seen to divide.

    Where it begins is counted in 64 bits, once for all threads, and its elements from there in 32 (``MAX_OFFSET``).
    """
    start = first_row * (tl.cast(outer_stride_v, tl.int64) * VECTOR)
    if not CHANNELS_LAST:
        start += tl.cast(tile, tl.int64) * (tl.cast(channel_stride_v, tl.int64) * VECTOR)
    return (ptr + start) + (rows * (tl.cast(outer_stride_v, tl.int32) * VECTOR) + columns)


@triton.jit
def items_of(split, splits, items, CHANNELS_LAST: tl.constexpr):
    """The first item of a split, how far apart its items are, and how many it has.

    In channels_last all splits together go through memory in order; in the contiguous layout each has a run of items.
    """
    if CHANNELS_LAST:
        return split, splits, tl.cdiv(items - split, splits)
    else:
        its_items = tl.cdiv(items, splits)
        first = split * its_items
        return first, 1, tl.minimum(its_items, items - first)


@triton.jit
def from_the_end():
    """The tile and split of a program that comes the sooner, the later the first launch's came: L2 holds its reads."""
    return tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def values_of(
    item, chunks, outer_size, inner_size, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    """How many values of a channel a work item has, int64."""
    if CHANNELS_LAST:
        return tl.minimum(outer_size - tl.cast(item, tl.int64) * OUTER, OUTER)
    else:
        columns = tl.minimum(inner_size - (item % chunks) * INNER, INNER)
        return tl.minimum(outer_size - tl.cast(item // chunks, tl.int64) * OUTER, OUTER) * columns


@triton.jit
def in_channels(b, CHANNELS_LAST: tl.constexpr):
    """(OUTER, INNER) summed over what belongs to a channel: (CT,)."""
    if CHANNELS_LAST:
        return tl.sum(b, 0)
    else:
        return tl.zeros([1], b.dtype) + tl.sum(b)


@triton.jit
def in_groups(
    b, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """(OUTER, INNER) summed over groups of GROUP elements that one thread holds: (ROWS, COLUMNS), no thread waits.

    A thread holds neighbours in a row (an access), and the same columns of rows that lie OUTER / GROUP apart.
    """
    if GROUP_ROWS:
        b_sums = tl.sum(tl.reshape(b, (GROUP, OUTER // GROUP, INNER)), 0)
        if CHANNELS_LAST:
            return b_sums
        else:
            return tl.reshape(b_sums, (OUTER * INNER // GROUP, 1))
    else:
        return tl.sum(tl.reshape(b, (OUTER * INNER // GROUP, GROUP)), 1)[:, None]


@triton.jit
def arrive(p_ticket, programs):
    """Say that this program's results are written; True in the last program to say so, which then sees all of them.

    The barriers order every thread's stores before the release, and the acquire before every thread's loads. The last
    one leaves the counter at zero for the next launch.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(p_ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    if is_last:
        tl.store(p_ticket, 0)
    return is_last


@triton.jit
def is_finite(b):
    """Neither NaN nor infinite."""
    return tl.abs(b) < float("inf")


@triton.jit
def sigmoid(b):
    """1 / (1 + exp(-b))."""
    return 1.0 / (1.0 + tl.exp(-b))


@triton.jit
def activate(b_z, ACTIVATION: tl.constexpr):
    """The activation; NaN stays NaN."""
    if ACTIVATION == RELU:
        b_z = tl.where(b_z <= 0.0, 0.0, b_z)
    if ACTIVATION == LEAKY_RELU:
        b_z = tl.where(b_z > 0.0, b_z, b_z * _SLOPE)
    if ACTIVATION == SILU:
        b_z = b_z * sigmoid(b_z)
    if ACTIVATION == HARDSWISH:
        b_z = b_z * tl.minimum(tl.maximum(b_z + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    return b_z


@triton.jit
def activation_backward(b_dy, b_z, ACTIVATION: tl.constexpr):
    """Dy times the activation's derivative at z, with PyTorch's conventions at the kinks."""
    if ACTIVATION == RELU:
        b_dy = tl.where(b_z <= 0.0, 0.0, b_dy)
    if ACTIVATION == LEAKY_RELU:
        b_dy = tl.where(b_z > 0.0, b_dy, b_dy * _SLOPE)
    if ACTIVATION == SILU:
        gate = sigmoid(b_z)
        b_dy = b_dy * (gate * (1.0 + b_z * (1.0 - gate)))
    if ACTIVATION == HARDSWISH:
        b_dy = tl.where(b_z <= -3.0, 0.0, tl.where(b_z < 3.0, b_dy * (b_z * (1.0 / 3.0) + 0.5), b_dy))
    return b_dy


@triton.jit
def bits_pointers(
    bits_ptr, first_row, tile, item, chunks, outer_size, channels, row_bytes,
    VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A pointer to the packed bits (``layout.bits_shape``) of each access, and which exist, (OUTER * INNER / VECTOR,).

    So the thread that has the elements has their bits too. In one dimension, lest the compiler turn rows and columns.
    """
    accesses = tl.arange(0, OUTER * INNER // VECTOR)
    rows, o_bytes = accesses // (INNER // VECTOR), accesses % (INNER // VECTOR) // (8 // VECTOR)
    apart = tl.cast(row_bytes, tl.int64)
    if CHANNELS_LAST:
        o_bytes += tile * (INNER // 8)
    else:
        o_bytes += tl.cast(item % chunks, tl.int32) * (INNER // 8)
        bits_ptr += tile * apart
        apart *= channels
    p_bits = (bits_ptr + first_row * apart) + (rows * tl.cast(apart, tl.int32) + o_bytes)
    return p_bits, rows_exist(first_row, rows, outer_size, OUTER) & (o_bytes < row_bytes)


@triton.jit
def bit_numbers(VECTOR: tl.constexpr, INNER: tl.constexpr):
    """(1, INNER / VECTOR, VECTOR): the bit of each column in its byte, the first in the lowest."""
    numbers = tl.arange(0, VECTOR)[None, None, :]
    if VECTOR < 8:
        numbers += (tl.arange(0, INNER // VECTOR) % (8 // VECTOR) * VECTOR)[None, :, None]
    return numbers


@triton.jit
def pack(b_bits, VECTOR: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Booleans (OUTER, INNER) as bytes, for each access that of which it has a part: (OUTER * INNER / VECTOR,)."""
    b_weights = tl.where(tl.reshape(b_bits, (OUTER, INNER // VECTOR, VECTOR)), 1 << bit_numbers(VECTOR, INNER), 0)
    b_bytes = tl.reshape(tl.sum(b_weights, 2), (OUTER * INNER // VECTOR,))
    if VECTOR < 8:
        b_whole = tl.sum(tl.reshape(b_bytes, (OUTER * INNER // 8, 8 // VECTOR)), 1)
        b_bytes = tl.reshape(
            tl.broadcast_to(b_whole[:, None], (OUTER * INNER // 8, 8 // VECTOR)), (OUTER * INNER // VECTOR,)
        )  # fmt: skip
    return b_bytes.to(tl.uint8)


@triton.jit
def unpack(b_bytes, VECTOR: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """The inverse of ``pack``."""
    b_bytes = tl.reshape(b_bytes.to(tl.int32), (OUTER, INNER // VECTOR))
    b_bits = (b_bytes[:, :, None] >> bit_numbers(VECTOR, INNER)) & 1
    return tl.reshape(b_bits, (OUTER, INNER)) != 0
