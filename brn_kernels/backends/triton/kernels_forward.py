"""The forward in two launches, ``stream_kernel`` and ``repair_kernel``, or in one.

In one where a program has all values of its channels: ``stream_kernel`` itself does the repair (``ALONE``), or, where
registers can hold them, ``resident_forward_kernel`` reads x once and knows the statistics before it writes.

``stream_kernel`` reads x once. It gathers the batch statistics and, for channels predicted not to be clipped, already
writes y from the running statistics. The last program of a bundle of splits merges theirs, the last of a channel tile's
bundles merges those and finishes the statistics: r, d, the running statistics, what the backward needs, and which
channels were not written rightly. ``repair_kernel`` writes those, from the end towards the beginning so that its first
reads hit the L2 cache; if there are none it returns at once.

Workspace, rows of ``padded`` values: 0 pivot, 1 scale, 2 shift (y = (x - pivot) * scale + shift), 3 whether it is to be
repaired, then for each split, then for each bundle of splits, the count; then as many means; then as many sums of
squares about them. None where one launch does and nobody wants the first three rows.
"""

import triton
import triton.language as tl

from .kernels_common import (
    SIZES,
    across_planes,
    activate,
    arrive,
    belongs,
    bits_pointers,
    channels_of,
    from_the_end,
    in_channels,
    in_groups,
    items_of,
    locate,
    number,
    pack,
    pointers,
    values_of,
)
from .kernels_limits import limits_now
from .kernels_statistics import about_mean, affine_of, finish, merge, merge_planes, put

COEFFICIENT_ROWS = tl.constexpr(4)
PARTIAL_ROWS = tl.constexpr(3)


@triton.jit(do_not_specialize=SIZES)
def stream_kernel(
    x_ptr, residual_ptr, y_ptr, bits_ptr,  # (outer, [channel,] inner), strides below
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, clipped_ptr,  # (channels,)
    counter_ptr, limits_ptr, auto_ptr,  # int64; (2,); (5, channels)
    saved_ptr, workspace_ptr, tickets_ptr,  # (4, channels); see above; counters of bundles and of tiles
    outer_size, channels, inner_v, chunks, items, bundle, padded, row_bytes, plane,
    x_outer_v, x_channel_v, residual_outer_v, residual_channel_v, y_outer_v, y_channel_v, hold, r_ramp, d_ramp,
    r_max: tl.float64, d_max: tl.float64, momentum: tl.float64, eps: tl.float64, values: tl.float64,
    ACC: tl.constexpr, CUMULATIVE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, CT: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    VECTOR: tl.constexpr, MERGE_ROWS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, splits): statistics, and y where it is predicted not to be clipped.

    ``ALONE``: there is one split, so that a program has all of its channels' values and does the repair itself.

    A split's sums are taken about the mean of its first item, ``origin``. That mean is of a k-th of the values, so its
    square distance from the mean of all is at most k variances: what cancels in s2 - s1^2 / count is bounded, however
    large the mean is.
    """
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    COLUMNS: tl.constexpr = INNER if CHANNELS_LAST else 1
    ROWS: tl.constexpr = OUTER * INNER // GROUP // COLUMNS
    o_columns = channels_of(tl.arange(0, COLUMNS), tile, plane, CHANNELS_LAST, INNER, CT)
    m_columns = o_columns < channels

    first, apart, its_items = items_of(split, splits, items, CHANNELS_LAST)
    b_next = load_item(  # before all else: it takes longest
        x_ptr, first, tile, chunks, outer_size, inner_v, plane, x_outer_v, x_channel_v, VECTOR, CHANNELS_LAST,
        OUTER, INNER, CT,
    )  # fmt: skip
    step = tl.full([], 0, tl.int64)
    if counter_ptr is not None:
        step = tl.load(counter_ptr)
    speculates = False
    pivot = tl.zeros([COLUMNS], ACC)
    scale = tl.zeros([COLUMNS], ACC)
    shift = tl.zeros([COLUMNS], ACC)
    predicted = tl.zeros([COLUMNS], tl.int32)
    if running_mean_ptr is not None:
        pivot, scale, shift, predicted = prediction(
            running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, clipped_ptr, step, limits_ptr, auto_ptr,
            channels, o_columns, m_columns, r_max, d_max, hold, r_ramp, d_ramp, eps, ACC,
        )  # fmt: skip
        speculates = tl.max(predicted, 0) > 0

    if ALONE and counter_ptr is not None:  # there is no second launch to advance it; meanwhile x is on its way
        if arrive(tickets_ptr, tl.num_programs(0)):
            tl.store(counter_ptr, step + 1)
    first_count = values_of(first, chunks, outer_size, inner_v * VECTOR, CHANNELS_LAST, OUTER, INNER)
    first_sums = in_groups(b_next.to(ACC), CHANNELS_LAST, OUTER, INNER, GROUP, GROUP_ROWS)
    origin = tl.sum(first_sums, 0) / first_count.to(ACC)
    s1 = tl.zeros([ROWS, COLUMNS], ACC)
    s2 = tl.zeros([ROWS, COLUMNS], ACC)
    count = tl.full([], 0, tl.int64)
    m_all = tl.full([1, 1], 1, tl.int1)
    for done in tl.range(0, its_items, disable_licm=True):  # kept outside, invariants take the registers of a program
        item = first + done * apart
        b_x = b_next.to(ACC)
        following = tl.where(done + 1 < its_items, item + apart, items)  # none after the last
        b_next = load_item(  # travels while this one is worked on
            x_ptr, following, tile, chunks, outer_size, inner_v, plane, x_outer_v, x_channel_v, VECTOR,
            CHANNELS_LAST, OUTER, INNER, CT,
        )  # fmt: skip
        first_row, rows, columns, m_exists = locate(
            item, tile, chunks, outer_size, inner_v, plane, VECTOR, CHANNELS_LAST, OUTER, INNER, CT
        )  # fmt: skip
        if residual_ptr is not None:
            b_residual = load_residual(
                residual_ptr, first_row, rows, columns, tile, m_exists & speculates, residual_outer_v,
                residual_channel_v, VECTOR, CHANNELS_LAST,
            )  # fmt: skip
        b_centered = tl.where(m_exists, b_x - origin[None, :], 0.0)
        s1 += in_groups(b_centered, CHANNELS_LAST, OUTER, INNER, GROUP, GROUP_ROWS)
        s2 += in_groups(b_centered * b_centered, CHANNELS_LAST, OUTER, INNER, GROUP, GROUP_ROWS)
        count += values_of(item, chunks, outer_size, inner_v * VECTOR, CHANNELS_LAST, OUTER, INNER)
        b_z = tl.fma(b_x - pivot[None, :], scale[None, :], shift[None, :])  # out here: no exchange of coefficients
        if residual_ptr is not None:
            b_z += b_residual.to(ACC)
        if speculates:
            write(
                b_z, first_row, rows, columns, m_exists, m_all, item, tile, y_ptr, bits_ptr, chunks, outer_size,
                channels, row_bytes, y_outer_v, y_channel_v, ACTIVATION, VECTOR, CHANNELS_LAST, INNER,
            )  # fmt: skip

    o_channels = tile * CT + tl.arange(0, CT)
    s1_total, s2_total = tl.sum(s1, 0), tl.sum(s2, 0)
    b_count = tl.zeros([COLUMNS], ACC) + count.to(ACC)
    m2 = about_mean(s1_total, s2_total, b_count)
    if COLUMNS == CT:
        mean = origin + s1_total / b_count
    else:
        b_count, mean, m2 = merge_planes(b_count, origin, s1_total / b_count, m2, plane, INNER, CT)
        predicted = tl.max(tl.where(belongs(plane, INNER, CT), predicted[None, :], 0), 1)
    if ALONE:
        o_pivot, o_scale, o_shift, wrong = finish(
            mean, m2, predicted, o_channels,
            running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, clipped_ptr, counter_ptr, step, limits_ptr,
            auto_ptr, saved_ptr, workspace_ptr, channels, padded, r_max, d_max, hold, r_ramp, d_ramp, momentum, eps,
            values, ACC, CUMULATIVE,
        )  # fmt: skip
        tl.debug_barrier()  # other threads than repair it may have written y wrongly
        repair(
            tile, split, splits, in_columns(o_pivot, plane, CHANNELS_LAST, INNER, CT),
            in_columns(o_scale, plane, CHANNELS_LAST, INNER, CT), in_columns(o_shift, plane, CHANNELS_LAST, INNER, CT),
            in_columns(wrong, plane, CHANNELS_LAST, INNER, CT) > 0, x_ptr, residual_ptr, y_ptr, bits_ptr,
            outer_size, channels, inner_v, chunks, items, row_bytes, plane,
            x_outer_v, x_channel_v, residual_outer_v, residual_channel_v, y_outer_v, y_channel_v,
            ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, VECTOR,
        )  # fmt: skip
    else:
        bundles = tl.cdiv(splits, bundle)
        p_tickets = tickets_ptr + tile * tl.where(bundles > 1, bundles + 1, 1)
        mine, between = split // bundle, (splits + bundles) * padded
        p_partials = workspace_ptr + COEFFICIENT_ROWS * padded + o_channels
        put(p_partials + split * padded, between, tl.where(predicted != 0, b_count, -b_count), mean, m2)
        in_mine = tl.minimum(bundle, splits - mine * bundle)
        is_last = arrive(p_tickets + mine, in_mine)
        if is_last:
            p_mine = p_partials + mine * bundle * padded
            b_count, mean, m2 = merge(p_mine, in_mine, padded, between, ACC, CT, MERGE_ROWS)
            if bundles > 1:
                put(p_partials + (splits + mine) * padded, between, b_count, mean, m2)
                is_last = arrive(p_tickets + bundles, bundles)
                if is_last:
                    p_bundles = p_partials + splits * padded
                    b_count, mean, m2 = merge(p_bundles, bundles, padded, between, ACC, CT, MERGE_ROWS)
        if is_last:
            if counter_ptr is not None:
                step = tl.load(counter_ptr)  # once more, rather than kept in registers all the while
            finish(
                mean, m2, (b_count > 0.0).to(tl.int32), o_channels,
                running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, clipped_ptr, counter_ptr, step, limits_ptr,
                auto_ptr, saved_ptr, workspace_ptr, channels, padded, r_max, d_max, hold, r_ramp, d_ramp, momentum,
                eps, values, ACC, CUMULATIVE,
            )  # fmt: skip


@triton.jit
def load_item(
    x_ptr, item, tile, chunks, outer_size, inner_v, plane, x_outer_v, x_channel_v, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """X of a work item as it is stored, (OUTER, INNER); 0 where there is none."""
    first_row, rows, columns, m_exists = locate(
        item, tile, chunks, outer_size, inner_v, plane, VECTOR, CHANNELS_LAST, OUTER, INNER, CT
    )  # fmt: skip
    p_x = pointers(x_ptr, first_row, rows, columns, tile, x_outer_v, x_channel_v, VECTOR, CHANNELS_LAST)
    return tl.load(p_x, mask=m_exists, other=0.0)


@triton.jit
def prediction(
    running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, clipped_ptr, step, limits_ptr, auto_ptr,
    channels, o_channels, m_channels, r_max: tl.float64, d_max: tl.float64, hold, r_ramp, d_ramp, eps: tl.float64,
    ACC: tl.constexpr,
):  # fmt: skip
    """The coefficients of an unclipped channel, (COLUMNS,) each, and 1 where a channel is predicted to be one.

    Predicted: the limits are open and the channel was not clipped at the last step.
    """
    r_limit, d_limit = limits_now(
        step, limits_ptr, auto_ptr, channels, o_channels, m_channels, r_max, d_max, hold, r_ramp, d_ramp, ACC
    )  # fmt: skip
    running_mean = tl.load(running_mean_ptr + o_channels, mask=m_channels, other=0.0).to(ACC)
    running_var = tl.load(running_var_ptr + o_channels, mask=m_channels, other=1.0).to(ACC)
    gamma, beta = affine_of(weight_ptr, bias_ptr, o_channels, m_channels, ACC)
    predicted = m_channels.to(tl.int32) * tl.where(r_limit > 1.0, 1, 0) * tl.where(d_limit > 0.0, 1, 0)
    if clipped_ptr is not None:
        clipped_before = tl.load(clipped_ptr + o_channels, mask=m_channels, other=0)
        predicted *= tl.where(clipped_before != 0, 0, 1)
    return running_mean, gamma / tl.sqrt(running_var + number(eps, ACC)), beta, predicted


@triton.jit
def load_residual(
    residual_ptr, first_row, rows, columns, tile, m_read, residual_outer_v, residual_channel_v, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The residual of a work item as it is stored, where ``m_read``."""
    p_residual = pointers(
        residual_ptr, first_row, rows, columns, tile, residual_outer_v, residual_channel_v, VECTOR, CHANNELS_LAST
    )  # fmt: skip
    return tl.load(p_residual, mask=m_read, other=0.0)


@triton.jit
def write(
    b_z, first_row, rows, columns, m_write, m_accesses, item, tile, y_ptr, bits_ptr, chunks, outer_size, channels,
    row_bytes, y_outer_v, y_channel_v, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Write y of one work item where ``m_write``, and its packed bits where ``m_accesses``, (1, INNER / VECTOR or 1).

    The one way in which any pass computes y, with ``b_z = fma(x - pivot, scale, shift)`` and the residual: its bits do
    not depend on the pass.
    """
    if bits_ptr is not None:
        p_bits, m_bytes = bits_pointers(
            bits_ptr, first_row, tile, item, chunks, outer_size, channels, row_bytes,
            VECTOR, CHANNELS_LAST, b_z.shape[0], INNER,
        )  # fmt: skip
        b_positive = ((b_z > 0.0) | (b_z != b_z)) & m_write
        m_bytes &= tl.arange(0, b_z.shape[0] * INNER // VECTOR) % (8 // VECTOR) == 0  # once a byte
        m_bytes &= tl.reshape(tl.broadcast_to(m_accesses, (b_z.shape[0], INNER // VECTOR)), m_bytes.shape)
        tl.store(p_bits, pack(b_positive, VECTOR, b_z.shape[0], INNER), mask=m_bytes)
    p_y = pointers(y_ptr, first_row, rows, columns, tile, y_outer_v, y_channel_v, VECTOR, CHANNELS_LAST)
    tl.store(p_y, activate(b_z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=m_write)


@triton.jit(do_not_specialize=SIZES)
def resident_forward_kernel(
    x_ptr, residual_ptr, y_ptr, bits_ptr,  # (outer, [channel,] inner), strides below
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, clipped_ptr,  # (channels,)
    counter_ptr, limits_ptr, auto_ptr,  # int64; (2,); (5, channels)
    saved_ptr, workspace_ptr, tickets_ptr,  # (4, channels); see above; (1,)
    outer_size, channels, inner_v, chunks, items, bundle, padded, row_bytes, plane,
    x_outer_v, x_channel_v, residual_outer_v, residual_channel_v, y_outer_v, y_channel_v, hold, r_ramp, d_ramp,
    r_max: tl.float64, d_max: tl.float64, momentum: tl.float64, eps: tl.float64, values: tl.float64,
    ACC: tl.constexpr, CUMULATIVE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, CT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, 1): a program holds all of its channels' values in registers: nothing need be predicted."""
    tile = tl.program_id(0)
    o_channels = tile * CT + tl.arange(0, CT)
    first_row, rows, columns, m_exists = locate(
        0, tile, chunks, outer_size, inner_v, plane, VECTOR, CHANNELS_LAST, OUTER, INNER, CT
    )  # fmt: skip
    p_x = pointers(x_ptr, first_row, rows, columns, tile, x_outer_v, x_channel_v, VECTOR, CHANNELS_LAST)
    b_x = tl.load(p_x, mask=m_exists, other=0.0).to(ACC)
    step = tl.full([], 0, tl.int64)
    if counter_ptr is not None:
        step = tl.load(counter_ptr)
        if arrive(tickets_ptr, tl.num_programs(0)):  # meanwhile x is on its way
            tl.store(counter_ptr, step + 1)
    if residual_ptr is not None:
        b_residual = load_residual(
            residual_ptr, first_row, rows, columns, tile, m_exists, residual_outer_v, residual_channel_v, VECTOR,
            CHANNELS_LAST,
        )  # fmt: skip
    m_values = number(values, ACC)
    origin = in_channels(b_x, CHANNELS_LAST) / m_values  # nearly the mean: by what rounding left, it is corrected
    b_centered = tl.where(m_exists, b_x - origin[None, :], 0.0)
    s1, s2 = in_channels(b_centered, CHANNELS_LAST), in_channels(b_centered * b_centered, CHANNELS_LAST)
    mean, m2 = origin + s1 / m_values, about_mean(s1, s2, m_values)
    pivot, scale, shift, _ = finish(
        mean, m2, o_channels * 0, o_channels,
        running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, clipped_ptr, counter_ptr, step, limits_ptr,
        auto_ptr, saved_ptr, workspace_ptr, channels, padded, r_max, d_max, hold, r_ramp, d_ramp, momentum, eps,
        values, ACC, CUMULATIVE,
    )  # fmt: skip
    b_z = tl.fma(b_x - pivot[None, :], scale[None, :], shift[None, :])
    if residual_ptr is not None:
        b_z += b_residual.to(ACC)
    write(
        b_z, first_row, rows, columns, m_exists, tl.full([1, 1], 1, tl.int1), 0, tile, y_ptr, bits_ptr, chunks,
        outer_size, channels, row_bytes, y_outer_v, y_channel_v, ACTIVATION, VECTOR, CHANNELS_LAST, INNER,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def repair_kernel(
    x_ptr, residual_ptr, y_ptr, bits_ptr, counter_ptr, workspace_ptr,
    outer_size, channels, inner_v, chunks, items, bundle, padded, row_bytes, plane,
    x_outer_v, x_channel_v, residual_outer_v, residual_channel_v, y_outer_v, y_channel_v,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, CT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, splits): y of the channels that the stream kernel left out or wrote wrongly."""
    if counter_ptr is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(counter_ptr, tl.load(counter_ptr) + 1)
    tile, split = from_the_end()
    COLUMNS: tl.constexpr = INNER if CHANNELS_LAST else 1
    p_pivot = workspace_ptr + channels_of(tl.arange(0, COLUMNS), tile, plane, CHANNELS_LAST, INNER, CT)
    repair(
        tile, split, tl.num_programs(1), tl.load(p_pivot), tl.load(p_pivot + padded), tl.load(p_pivot + 2 * padded),
        tl.load(p_pivot + 3 * padded) > 0.0, x_ptr, residual_ptr, y_ptr, bits_ptr,
        outer_size, channels, inner_v, chunks, items, row_bytes, plane,
        x_outer_v, x_channel_v, residual_outer_v, residual_channel_v, y_outer_v, y_channel_v,
        ACC, ACTIVATION, CHANNELS_LAST, OUTER, INNER, CT, VECTOR,
    )  # fmt: skip


@triton.jit
def in_columns(b, plane, CHANNELS_LAST: tl.constexpr, INNER: tl.constexpr, CT: tl.constexpr):
    """(CT,) to the columns, (INNER,), or (1,) where all have the same channel."""
    if CHANNELS_LAST and CT != INNER:
        return across_planes(b, plane, INNER, CT)
    else:
        return b


@triton.jit
def repair(
    tile, split, splits, pivot, scale, shift, wrong, x_ptr, residual_ptr, y_ptr, bits_ptr,
    outer_size, channels, inner_v, chunks, items, row_bytes, plane,
    x_outer_v, x_channel_v, residual_outer_v, residual_channel_v, y_outer_v, y_channel_v,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, CT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Y of one split of a channel tile, of its channels that were left out or written wrongly.

    Coefficients and ``wrong`` are (COLUMNS,). Eight neighbouring columns are repaired together, so that the mask is
    constant along an access of 16 bytes.
    """
    if CHANNELS_LAST:
        m_groups = tl.max(tl.reshape(wrong.to(tl.int32), (INNER // 8, 8)), 1) > 0
        m_groups |= tl.sum(m_groups.to(tl.int32), 0) > INNER // 8 // 4  # whole rows take less time than many pieces
        m_columns = tl.reshape(tl.broadcast_to(m_groups[:, None], (INNER // 8, 8)), (INNER,))
        m_accesses = tl.reshape(tl.broadcast_to(m_groups[:, None], (INNER // 8, 8 // VECTOR)), (INNER // VECTOR,))
    else:
        m_groups = wrong
        m_accesses = wrong
        m_columns = wrong
    if tl.max(m_groups.to(tl.int32), 0) > 0:
        first, apart, its_items = items_of(split, splits, items, CHANNELS_LAST)
        for done in range(0, its_items):
            item = first + (its_items - 1 - done) * apart
            first_row, rows, columns, m_exists = locate(
                item, tile, chunks, outer_size, inner_v, plane, VECTOR, CHANNELS_LAST, OUTER, INNER, CT
            )  # fmt: skip
            m_repair = m_exists & m_columns[None, :]
            if CHANNELS_LAST and VECTOR > 1:
                m_repair = tl.max_constancy(m_repair, [1, VECTOR])  # which the compiler does not see
            p_x = pointers(x_ptr, first_row, rows, columns, tile, x_outer_v, x_channel_v, VECTOR, CHANNELS_LAST)
            b_x = tl.load(p_x, mask=m_repair, other=0.0).to(ACC)
            b_z = tl.fma(b_x - pivot[None, :], scale[None, :], shift[None, :])
            if residual_ptr is not None:
                b_z += load_residual(
                    residual_ptr, first_row, rows, columns, tile, m_repair, residual_outer_v, residual_channel_v,
                    VECTOR, CHANNELS_LAST,
                ).to(ACC)  # fmt: skip
            write(
                b_z, first_row, rows, columns, m_repair, m_accesses[None, :], item, tile, y_ptr, bits_ptr, chunks,
                outer_size, channels, row_bytes, y_outer_v, y_channel_v, ACTIVATION, VECTOR, CHANNELS_LAST, INNER,
            )  # fmt: skip
