"""The backward: ``reduce_kernel`` then ``apply_kernel``, or both at once where there is one split: ``alone_kernel``.

Where registers can hold x and dy of a channel, ``resident_backward_kernel`` reads them once.

With dy' the gradient behind the activation and x_bn = (x - batch_mean) * inv_std::

    S1 = sum(dy')    S2 = sum(dy' * x_bn)    dbeta = S1    dgamma = r * S2 + d * S1
    dx = gamma * r * inv_std * (dy' - S1 / m - x_bn * S2 / m)    dresidual = dy'

Reduce reads x and dy, apply reads them again and writes dx, walking from the end towards the beginning so that its
first reads hit the L2 cache. The activation's argument is recomputed from x, or its sign read from packed bits.

Workspace, rows of ``padded`` values: 0 S1 / m, 1 inv_std * S2 / m, then S1 of each split and of each
bundle of splits, then as many S2.
"""

import triton
import triton.language as tl

from .kernels_common import (
    NONE,
    SILU,
    SIZES,
    across_planes,
    activation_backward,
    arrive,
    bits_pointers,
    channels_of,
    from_the_end,
    in_channels,
    in_groups,
    items_of,
    locate,
    number,
    over_planes,
    pointers,
    unpack,
)

COEFFICIENT_ROWS = tl.constexpr(2)
PARTIAL_ROWS = tl.constexpr(2)


@triton.jit
def channel_values(
    saved_ptr, weight_ptr, bias_ptr, o_channels, channels, ACC: tl.constexpr
):  # fmt: skip
    """(COLUMNS,) each: batch_mean, inv_std, and the scale and shift with which z = (x - batch_mean) * scale + shift."""
    m_channels = o_channels < channels
    batch_mean = tl.load(saved_ptr + o_channels, mask=m_channels, other=0.0)
    inv_std = tl.load(saved_ptr + channels + o_channels, mask=m_channels, other=0.0)
    scale = inv_std * tl.load(saved_ptr + 2 * channels + o_channels, mask=m_channels, other=0.0)
    shift = tl.load(saved_ptr + 3 * channels + o_channels, mask=m_channels, other=0.0)
    if weight_ptr is not None:
        gamma = tl.load(weight_ptr + o_channels, mask=m_channels, other=0.0).to(ACC)
        scale *= gamma
        shift *= gamma
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + o_channels, mask=m_channels, other=0.0).to(ACC)
    return batch_mean, inv_std, scale, shift


@triton.jit
def load_item(
    dy_ptr, x_ptr, bits_ptr, item, tile, batch_mean, scale, shift, outer_size, channels, inner_v, chunks, row_bytes,
    plane, dy_outer_v, dy_channel_v, x_outer_v, x_channel_v,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    CT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Where a work item lies and which of its elements exist; its dy' and x - batch_mean, (OUTER, INNER)."""
    first_row, rows, columns, m_exists = locate(
        item, tile, chunks, outer_size, inner_v, plane, VECTOR, CHANNELS_LAST, OUTER, INNER, CT
    )  # fmt: skip
    p_x = pointers(x_ptr, first_row, rows, columns, tile, x_outer_v, x_channel_v, VECTOR, CHANNELS_LAST)
    p_dy = pointers(dy_ptr, first_row, rows, columns, tile, dy_outer_v, dy_channel_v, VECTOR, CHANNELS_LAST)
    b_x = tl.load(p_x, mask=m_exists, other=0.0).to(ACC)
    b_dy = tl.load(p_dy, mask=m_exists, other=0.0).to(ACC)
    b_centered = b_x - batch_mean[None, :]
    if ACTIVATION == SILU:  # beyond the tensor x is 0, maybe so far from the mean that the derivative there is NaN
        b_centered = tl.where(m_exists, b_centered, 0.0)
    if bits_ptr is not None:
        p_bits, m_bytes = bits_pointers(
            bits_ptr, first_row, tile, item, chunks, outer_size, channels, row_bytes,
            VECTOR, CHANNELS_LAST, OUTER, INNER,
        )  # fmt: skip
        b_dy = tl.where(unpack(tl.load(p_bits, mask=m_bytes, other=0), VECTOR, OUTER, INNER), b_dy, 0.0)
    elif ACTIVATION != NONE:
        b_z = tl.fma(b_centered, scale[None, :], shift[None, :])
        b_dy = activation_backward(b_dy, b_z, ACTIVATION)
    return first_row, rows, columns, m_exists, b_dy, b_centered


@triton.jit
def reduce_split(
    tile, split, splits, dy_ptr, x_ptr, bits_ptr, weight_ptr, bias_ptr, saved_ptr,
    outer_size, channels, inner_v, chunks, items, row_bytes, plane,
    dy_outer_v, dy_channel_v, x_outer_v, x_channel_v,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    CT: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """S1 and S2 of one split of a channel tile, (CT,) each."""
    COLUMNS: tl.constexpr = INNER if CHANNELS_LAST else 1
    ROWS: tl.constexpr = OUTER * INNER // GROUP // COLUMNS
    o_columns = channels_of(tl.arange(0, COLUMNS), tile, plane, CHANNELS_LAST, INNER, CT)
    batch_mean, inv_std, scale, shift = channel_values(saved_ptr, weight_ptr, bias_ptr, o_columns, channels, ACC)
    s1 = tl.zeros([ROWS, COLUMNS], ACC)
    s2 = tl.zeros([ROWS, COLUMNS], ACC)
    first, apart, its_items = items_of(split, splits, items, CHANNELS_LAST)
    for done in range(0, its_items):
        item = first + done * apart
        _, _, _, _, b_dy, b_centered = load_item(
            dy_ptr, x_ptr, bits_ptr, item, tile, batch_mean, scale, shift, outer_size, channels, inner_v, chunks,
            row_bytes, plane, dy_outer_v, dy_channel_v, x_outer_v, x_channel_v,
            ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, VECTOR,
        )  # fmt: skip
        s1 += in_groups(b_dy, CHANNELS_LAST, OUTER, INNER, GROUP, GROUP_ROWS)
        s2 += in_groups(b_dy * b_centered, CHANNELS_LAST, OUTER, INNER, GROUP, GROUP_ROWS)
    s1_total, s2_total = tl.sum(s1, 0), tl.sum(s2, 0) * inv_std
    if COLUMNS != CT:
        s1_total = over_planes(s1_total, plane, INNER, CT)
        s2_total = over_planes(s2_total, plane, INNER, CT)
    return s1_total, s2_total


@triton.jit
def put(p_partial, between, s1, s2):
    """Write a partial result; its two numbers lie ``between`` apart."""
    tl.store(p_partial, s1)
    tl.store(p_partial + between, s2)


@triton.jit
def merge(
    p_partials, number_of_them, padded, between, ACC: tl.constexpr, CT: tl.constexpr, MERGE_ROWS: tl.constexpr
):  # fmt: skip
    """S1 and S2, (CT,) each, of partial results that lie ``padded`` apart, added up in a fixed order."""
    s1 = tl.zeros([MERGE_ROWS, CT], ACC)
    s2 = tl.zeros([MERGE_ROWS, CT], ACC)
    for start in tl.range(0, number_of_them, MERGE_ROWS, loop_unroll_factor=2):
        o_partials = start + tl.arange(0, MERGE_ROWS)
        p_s1 = p_partials[None, :] + (o_partials * padded)[:, None]
        m_partials = (o_partials < number_of_them)[:, None]
        s1 += tl.load(p_s1, mask=m_partials, other=0.0, cache_modifier=".cg")
        s2 += tl.load(p_s1 + between, mask=m_partials, other=0.0, cache_modifier=".cg")
    return tl.sum(s1, 0), tl.sum(s2, 0)


@triton.jit
def finish(
    s1, s2, o_channels, saved_ptr, dweight_ptr, dbias_ptr, channels, values: tl.float64, ACC: tl.constexpr
):  # fmt: skip
    """Writes dgamma and dbeta; what apply needs, (CT,) each: S1 / m, inv_std * S2 / m."""
    m_channels = o_channels < channels
    inv_std = tl.load(saved_ptr + channels + o_channels, mask=m_channels, other=0.0)
    r = tl.load(saved_ptr + 2 * channels + o_channels, mask=m_channels, other=0.0)
    d = tl.load(saved_ptr + 3 * channels + o_channels, mask=m_channels, other=0.0)
    tl.store(dweight_ptr + o_channels, r * s2 + d * s1, mask=m_channels)
    tl.store(dbias_ptr + o_channels, s1, mask=m_channels)
    m_values = number(values, ACC)
    return s1 / m_values, inv_std * s2 / m_values


@triton.jit
def apply_split(
    tile, split, splits, mean_dy, slope, dy_ptr, x_ptr, bits_ptr, weight_ptr, bias_ptr, saved_ptr, dx_ptr,
    dresidual_ptr, outer_size, channels, inner_v, chunks, items, row_bytes, plane,
    dy_outer_v, dy_channel_v, x_outer_v, x_channel_v, dx_outer_v, dx_channel_v, dresidual_outer_v, dresidual_channel_v,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    CT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Dx and dresidual of one split of a channel tile, from its end to its beginning; mean_dy and slope (COLUMNS,)."""
    COLUMNS: tl.constexpr = INNER if CHANNELS_LAST else 1
    o_columns = channels_of(tl.arange(0, COLUMNS), tile, plane, CHANNELS_LAST, INNER, CT)
    batch_mean, _, scale, shift = channel_values(saved_ptr, weight_ptr, bias_ptr, o_columns, channels, ACC)
    first, apart, its_items = items_of(split, splits, items, CHANNELS_LAST)
    for done in range(0, its_items):
        item = first + (its_items - 1 - done) * apart
        first_row, rows, columns, m_exists, b_dy, b_centered = load_item(
            dy_ptr, x_ptr, bits_ptr, item, tile, batch_mean, scale, shift, outer_size, channels, inner_v, chunks,
            row_bytes, plane, dy_outer_v, dy_channel_v, x_outer_v, x_channel_v,
            ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, VECTOR,
        )  # fmt: skip
        write(
            b_dy, b_centered, first_row, rows, columns, m_exists, tile, mean_dy, slope, scale, dx_ptr, dresidual_ptr,
            dx_outer_v, dx_channel_v, dresidual_outer_v, dresidual_channel_v, VECTOR, CHANNELS_LAST,
        )  # fmt: skip


@triton.jit
def write(
    b_dy, b_centered, first_row, rows, columns, m_exists, tile, mean_dy, slope, scale, dx_ptr, dresidual_ptr,
    dx_outer_v, dx_channel_v, dresidual_outer_v, dresidual_channel_v, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Dx and dresidual of a work item."""
    if dx_ptr is not None:
        b_dx = scale[None, :] * (b_dy - mean_dy[None, :] - b_centered * slope[None, :])
        p_dx = pointers(dx_ptr, first_row, rows, columns, tile, dx_outer_v, dx_channel_v, VECTOR, CHANNELS_LAST)
        tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_exists)
    if dresidual_ptr is not None:
        p_dresidual = pointers(
            dresidual_ptr, first_row, rows, columns, tile, dresidual_outer_v, dresidual_channel_v, VECTOR, CHANNELS_LAST
        )  # fmt: skip
        tl.store(p_dresidual, b_dy.to(dresidual_ptr.dtype.element_ty), mask=m_exists)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    dy_ptr, x_ptr, bits_ptr,  # (outer, [channel,] inner), strides below
    weight_ptr, bias_ptr, saved_ptr, dweight_ptr, dbias_ptr,  # (channels,), saved (4, channels)
    workspace_ptr, tickets_ptr,  # see above; a counter for each bundle, and one for each tile's bundles
    outer_size, channels, inner_v, chunks, items, bundle, padded, row_bytes, plane,
    dy_outer_v, dy_channel_v, x_outer_v, x_channel_v, values: tl.float64,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    CT: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, VECTOR: tl.constexpr, MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, splits)."""
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    s1, s2 = reduce_split(
        tile, split, splits, dy_ptr, x_ptr, bits_ptr, weight_ptr, bias_ptr, saved_ptr, outer_size, channels, inner_v,
        chunks, items, row_bytes, plane, dy_outer_v, dy_channel_v, x_outer_v, x_channel_v,
        ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, GROUP, GROUP_ROWS, VECTOR,
    )  # fmt: skip
    o_channels = tile * CT + tl.arange(0, CT)
    bundles = tl.cdiv(splits, bundle)
    p_tickets = tickets_ptr + tile * tl.where(bundles > 1, bundles + 1, 1)
    mine, between = split // bundle, (splits + bundles) * padded
    p_partials = workspace_ptr + COEFFICIENT_ROWS * padded + o_channels
    put(p_partials + split * padded, between, s1, s2)
    in_mine = tl.minimum(bundle, splits - mine * bundle)
    is_last = arrive(p_tickets + mine, in_mine)
    if is_last:
        p_mine = p_partials + mine * bundle * padded
        s1, s2 = merge(p_mine, in_mine, padded, between, ACC, CT, MERGE_ROWS)
        if bundles > 1:
            put(p_partials + (splits + mine) * padded, between, s1, s2)
            is_last = arrive(p_tickets + bundles, bundles)
            if is_last:
                s1, s2 = merge(p_partials + splits * padded, bundles, padded, between, ACC, CT, MERGE_ROWS)
    if is_last:
        mean_dy, slope = finish(s1, s2, o_channels, saved_ptr, dweight_ptr, dbias_ptr, channels, values, ACC)
        tl.store(workspace_ptr + o_channels, mean_dy)
        tl.store(workspace_ptr + padded + o_channels, slope)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    dy_ptr, x_ptr, bits_ptr, weight_ptr, bias_ptr, saved_ptr, dx_ptr, dresidual_ptr, workspace_ptr,
    outer_size, channels, inner_v, chunks, items, bundle, padded, row_bytes, plane,
    dy_outer_v, dy_channel_v, x_outer_v, x_channel_v, dx_outer_v, dx_channel_v, dresidual_outer_v, dresidual_channel_v,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    CT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, splits)."""
    COLUMNS: tl.constexpr = INNER if CHANNELS_LAST else 1
    tile, split = from_the_end()
    p_mean_dy = workspace_ptr + channels_of(tl.arange(0, COLUMNS), tile, plane, CHANNELS_LAST, INNER, CT)
    apply_split(
        tile, split, tl.num_programs(1), tl.load(p_mean_dy), tl.load(p_mean_dy + padded), dy_ptr, x_ptr, bits_ptr,
        weight_ptr, bias_ptr, saved_ptr, dx_ptr, dresidual_ptr, outer_size, channels, inner_v, chunks, items,
        row_bytes, plane, dy_outer_v, dy_channel_v, x_outer_v, x_channel_v, dx_outer_v, dx_channel_v,
        dresidual_outer_v, dresidual_channel_v, ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, VECTOR,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def alone_kernel(
    dy_ptr, x_ptr, bits_ptr, weight_ptr, bias_ptr, saved_ptr, dweight_ptr, dbias_ptr, dx_ptr, dresidual_ptr,
    outer_size, channels, inner_v, chunks, items, bundle, padded, row_bytes, plane,
    dy_outer_v, dy_channel_v, x_outer_v, x_channel_v, dx_outer_v, dx_channel_v, dresidual_outer_v, dresidual_channel_v,
    values: tl.float64,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    CT: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, 1): with one split a program has all of its channels' values and need wait for no other."""
    tile = tl.program_id(0)
    s1, s2 = reduce_split(
        tile, 0, 1, dy_ptr, x_ptr, bits_ptr, weight_ptr, bias_ptr, saved_ptr, outer_size, channels, inner_v,
        chunks, items, row_bytes, plane, dy_outer_v, dy_channel_v, x_outer_v, x_channel_v,
        ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, GROUP, GROUP_ROWS, VECTOR,
    )  # fmt: skip
    o_channels = tile * CT + tl.arange(0, CT)
    mean_dy, slope = finish(s1, s2, o_channels, saved_ptr, dweight_ptr, dbias_ptr, channels, values, ACC)
    if CHANNELS_LAST and CT != INNER:
        mean_dy, slope = across_planes(mean_dy, plane, INNER, CT), across_planes(slope, plane, INNER, CT)
    apply_split(
        tile, 0, 1, mean_dy, slope, dy_ptr, x_ptr, bits_ptr, weight_ptr, bias_ptr, saved_ptr, dx_ptr, dresidual_ptr,
        outer_size, channels, inner_v, chunks, items, row_bytes, plane, dy_outer_v, dy_channel_v,
        x_outer_v, x_channel_v, dx_outer_v, dx_channel_v, dresidual_outer_v, dresidual_channel_v,
        ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, VECTOR,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def resident_backward_kernel(
    dy_ptr, x_ptr, bits_ptr, weight_ptr, bias_ptr, saved_ptr, dweight_ptr, dbias_ptr, dx_ptr, dresidual_ptr,
    outer_size, channels, inner_v, chunks, items, bundle, padded, row_bytes, plane,
    dy_outer_v, dy_channel_v, x_outer_v, x_channel_v, dx_outer_v, dx_channel_v, dresidual_outer_v, dresidual_channel_v,
    values: tl.float64,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    CT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, 1): a program holds all of its channels' values in registers, and reads them once."""
    tile = tl.program_id(0)
    o_channels = tile * CT + tl.arange(0, CT)
    batch_mean, inv_std, scale, shift = channel_values(saved_ptr, weight_ptr, bias_ptr, o_channels, channels, ACC)
    first_row, rows, columns, m_exists, b_dy, b_centered = load_item(
        dy_ptr, x_ptr, bits_ptr, 0, tile, batch_mean, scale, shift, outer_size, channels, inner_v, chunks,
        row_bytes, plane, dy_outer_v, dy_channel_v, x_outer_v, x_channel_v,
        ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, VECTOR,
    )  # fmt: skip
    s1, s2 = in_channels(b_dy, CHANNELS_LAST), in_channels(b_dy * b_centered, CHANNELS_LAST) * inv_std
    mean_dy, slope = finish(s1, s2, o_channels, saved_ptr, dweight_ptr, dbias_ptr, channels, values, ACC)
    write(
        b_dy, b_centered, first_row, rows, columns, m_exists, tile, mean_dy, slope, scale, dx_ptr, dresidual_ptr,
        dx_outer_v, dx_channel_v, dresidual_outer_v, dresidual_channel_v, VECTOR, CHANNELS_LAST,
    )  # fmt: skip
