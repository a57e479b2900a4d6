"""A forward's statistics: merged from partial results, and what follows from them for each channel."""

import triton
import triton.language as tl

from .kernels_common import across_planes, is_finite, number, over_planes
from .kernels_limits import WARMUP, limits_now, observe


@triton.jit
def affine_of(weight_ptr, bias_ptr, o_channels, m_channels, ACC: tl.constexpr):
    """Gamma and beta of ``o_channels``, in their shape."""
    gamma = (o_channels * 0 + 1).to(ACC)
    beta = (o_channels * 0).to(ACC)
    if weight_ptr is not None:
        gamma = tl.load(weight_ptr + o_channels, mask=m_channels, other=0.0).to(ACC)
    if bias_ptr is not None:
        beta = tl.load(bias_ptr + o_channels, mask=m_channels, other=0.0).to(ACC)
    return gamma, beta


@triton.jit
def about_mean(s1, s2, count):
    """The sum of squares about the mean, from the sums and sums of squares about an origin."""
    m2 = s2 - s1 * (s1 / count)
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # by a rounding; NaN stays
    return tl.where(s2 < float("inf"), m2, s2)  # inf - inf says nothing


@triton.jit
def merge_planes(count, origin, shift, m2, plane, INNER: tl.constexpr, CT: tl.constexpr):
    """Count, mean and squares about it of each channel, (CT,), from those of its columns, (INNER,).

    A column's mean is origin + shift. Sums are taken about the origin of the channel's first column: fewer digits lost.
    """
    is_first = tl.arange(0, INNER) % plane == 0
    about = over_planes(tl.where(is_first, origin, 0.0), plane, INNER, CT)
    delta = (origin - across_planes(about, plane, INNER, CT)) + shift
    total = over_planes(count, plane, INNER, CT)
    mean = over_planes(count * delta, plane, INNER, CT) / total
    delta -= across_planes(mean, plane, INNER, CT)
    return total, about + mean, over_planes(m2 + count * delta * delta, plane, INNER, CT)


@triton.jit
def put(p_partial, between, count, mean, m2):
    """Write a partial result; its three numbers lie ``between`` apart."""
    tl.store(p_partial, count)
    tl.store(p_partial + between, mean)
    tl.store(p_partial + 2 * between, m2)


@triton.jit
def merge(
    p_partials, number_of_them, padded, between, ACC: tl.constexpr, CT: tl.constexpr, MERGE_ROWS: tl.constexpr
):  # fmt: skip
    """Count, mean and squares about it, (CT,) each, of partial results that lie ``padded`` apart, in a fixed order.

    Chan's formula, for those that lie MERGE_ROWS apart, then for the rows: each is read once. A count is negative where
    a channel was predicted to be clipped by any of them: they may disagree, if the same layer runs on another stream.
    """
    total = tl.zeros([MERGE_ROWS, CT], ACC)
    written = tl.zeros([MERGE_ROWS, CT], ACC)
    mean = tl.zeros([MERGE_ROWS, CT], ACC)
    m2 = tl.zeros([MERGE_ROWS, CT], ACC)
    origin = tl.load(p_partials + between, cache_modifier=".cg")  # close to the mean: fewer digits lost
    for start in range(0, number_of_them, MERGE_ROWS):
        o_partials = start + tl.arange(0, MERGE_ROWS)
        p_count = p_partials[None, :] + (o_partials * padded)[:, None]
        m_partials = (o_partials < number_of_them)[:, None]
        signed_count = tl.load(p_count, mask=m_partials, other=0.0, cache_modifier=".cg")
        its_mean = tl.load(p_count + between, mask=m_partials, other=0.0, cache_modifier=".cg")
        its_m2 = tl.load(p_count + 2 * between, mask=m_partials, other=0.0, cache_modifier=".cg")
        count = tl.abs(signed_count)
        delta = tl.where(m_partials, its_mean - origin[None, :] - mean, 0.0)
        share = count / tl.maximum(total + count, 1.0)
        m2 += its_m2 + delta * (delta * (total * share))  # in this order 0 times a huge square is not NaN
        mean += delta * share
        total += count
        written += signed_count
    count_of_all = tl.sum(total, 0)
    mean_of_all = tl.sum(total * mean, 0) / count_of_all
    mean -= mean_of_all[None, :]
    m2_of_all = tl.sum(m2 + mean * (total * mean), 0)
    signed_count_of_all = tl.where(tl.sum(written, 0) == count_of_all, count_of_all, -count_of_all)
    return signed_count_of_all, origin + mean_of_all, m2_of_all


@triton.jit
def finish(
    batch_mean, m2, predicted, o_channels,
    running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, clipped_ptr, counter_ptr, step, limits_ptr, auto_ptr,
    saved_ptr, workspace_ptr, channels, padded, r_max: tl.float64, d_max: tl.float64, hold, r_ramp, d_ramp,
    momentum: tl.float64, eps: tl.float64, values: tl.float64, ACC: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """All that follows from the statistics of a channel tile; pivot, scale, shift and what is to be repaired, (CT,)."""
    m_channels = o_channels < channels
    m_values = number(values, ACC)
    batch_var = m2 / m_values

    gamma, beta = affine_of(weight_ptr, bias_ptr, o_channels, m_channels, ACC)
    batch_std = tl.sqrt(batch_var + number(eps, ACC))
    r = batch_mean * 0.0 + 1.0
    d = batch_mean * 0.0
    wrong = tl.where(m_channels, 1, 0)
    pivot = batch_mean
    scale = gamma / batch_std
    shift = beta
    if running_mean_ptr is not None:
        running_mean = tl.load(running_mean_ptr + o_channels, mask=m_channels, other=0.0).to(ACC)
        running_var = tl.load(running_var_ptr + o_channels, mask=m_channels, other=1.0).to(ACC)
        running_std = tl.sqrt(running_var + number(eps, ACC))
        r_limit, d_limit = limits_now(
            step, limits_ptr, auto_ptr, channels, o_channels, m_channels, r_max, d_max, hold, r_ramp, d_ramp,
            ACC,
        )  # fmt: skip
        r = batch_std / running_std
        d = (batch_mean - running_mean) / running_std
        finite = is_finite(batch_mean) & is_finite(batch_var)
        clipped = (r > r_limit) | (r < 1.0 / r_limit) | (tl.abs(d) > d_limit)
        r = tl.where(r > r_limit, r_limit, tl.where(r < 1.0 / r_limit, 1.0 / r_limit, r))  # NaN stays NaN
        d = tl.where(d > d_limit, d_limit, tl.where(d < -d_limit, -d_limit, d))
        corrected = tl.where(finite, tl.where(clipped, 1, 0), 1)
        pivot = tl.where(corrected != 0, batch_mean, running_mean)
        scale = tl.where(corrected != 0, gamma * r / batch_std, gamma / running_std)
        shift = tl.where(corrected != 0, gamma * d + beta, beta)
        wrong = tl.where(m_channels, tl.where(corrected != 0, 1, 1 - predicted), 0)

        factor = number(momentum, ACC)
        if CUMULATIVE:
            factor = 1.0 / (step + 1).to(ACC)
        elif auto_ptr is not None and counter_ptr is not None:
            warmup = number(WARMUP, ACC)
            at_least = warmup / (step.to(ACC) + warmup)
            factor = tl.where(factor > 0.0, tl.maximum(factor, at_least), factor)
        unbiased_var = batch_var * (m_values / (m_values - 1.0))
        new_mean = (running_mean + factor * (batch_mean - running_mean)).to(running_mean_ptr.dtype.element_ty)
        new_var = (running_var + factor * (unbiased_var - running_var)).to(running_var_ptr.dtype.element_ty)
        m_tells = m_channels & (o_channels * 0 + m_values >= 2.0)  # one value says nothing about a variance
        m_finite = m_tells & finite
        tl.debug_barrier()  # every warp has read the statistics and limits that are overwritten now
        if auto_ptr is not None:
            observe(auto_ptr, channels, o_channels, m_tells, batch_mean, batch_var, running_var, eps, ACC)
        tl.store(running_mean_ptr + o_channels, new_mean, mask=m_finite & is_finite(new_mean.to(ACC)))
        tl.store(running_var_ptr + o_channels, new_var, mask=m_finite & is_finite(new_var.to(ACC)))
        if clipped_ptr is not None:
            tl.store(clipped_ptr + o_channels, (corrected != 0).to(clipped_ptr.dtype.element_ty), mask=m_tells)

    tl.store(saved_ptr + o_channels, batch_mean, mask=m_channels)
    tl.store(saved_ptr + channels + o_channels, 1.0 / batch_std, mask=m_channels)
    tl.store(saved_ptr + 2 * channels + o_channels, r, mask=m_channels)
    tl.store(saved_ptr + 3 * channels + o_channels, d, mask=m_channels)
    if workspace_ptr is not None:  # somebody else than this program wants them
        tl.store(workspace_ptr + o_channels, pivot)
        tl.store(workspace_ptr + padded + o_channels, scale)
        tl.store(workspace_ptr + 2 * padded + o_channels, shift)
        tl.store(workspace_ptr + 3 * padded + o_channels, wrong.to(ACC))
    return pivot, scale, shift, wrong
