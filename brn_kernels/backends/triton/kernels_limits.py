"""The limits of r and d in force: a schedule's, a tensor's, or automatic ones, whose state is also kept up here."""

import triton
import triton.language as tl

from .. import auto_limits
from .kernels_common import is_finite, number

NOISE_WIDTHS = tl.constexpr(auto_limits.NOISE_WIDTHS)
RATE = tl.constexpr(auto_limits.RATE)
MIN_BATCHES = tl.constexpr(auto_limits.MIN_BATCHES)
WARMUP = tl.constexpr(auto_limits.WARMUP)


@triton.jit
def limits_now(
    step, limits_ptr, auto_ptr, channels, o_channels, m_channels,
    r_max: tl.float64, d_max: tl.float64, hold, r_ramp, d_ramp, ACC: tl.constexpr,
):  # fmt: skip
    """r_max and d_max in force: those of ``auto_ptr`` for ``o_channels`` if given; else two numbers.

    Those are ``limits_ptr``'s if given, else the schedule's at ``step`` (``schedule.py``).
    """
    if auto_ptr is not None:
        count = tl.load(auto_ptr + o_channels, mask=m_channels, other=0.0).to(ACC)
        noise_d = tl.load(auto_ptr + 3 * channels + o_channels, mask=m_channels, other=0.0).to(ACC)
        noise_r = tl.load(auto_ptr + 4 * channels + o_channels, mask=m_channels, other=0.0).to(ACC)
        widths = tl.where(count >= MIN_BATCHES, NOISE_WIDTHS, 0.0).to(ACC)
        r_limit = tl.exp(widths * tl.sqrt(noise_r))
        d_limit = widths * tl.sqrt(noise_d)
    elif limits_ptr is not None:
        r_limit = tl.load(limits_ptr).to(ACC)
        d_limit = tl.load(limits_ptr + 1).to(ACC)
    else:
        since = step - hold
        r_limit = ramp_at(since, 1.0, r_max, r_ramp, ACC)
        d_limit = ramp_at(since, 0.0, d_max, d_ramp, ACC)
    return r_limit, d_limit


@triton.jit
def observe(
    auto_ptr, channels, o_channels, m_tells, batch_mean, batch_var, running_var, eps: tl.float64, ACC: tl.constexpr
):  # fmt: skip
    """``auto_limits.observe``: take the batch into the state of automatic limits."""
    count = tl.load(auto_ptr + o_channels, mask=m_tells, other=0.0).to(ACC)
    last_mean = tl.load(auto_ptr + channels + o_channels, mask=m_tells, other=0.0).to(ACC)
    last_log_std = tl.load(auto_ptr + 2 * channels + o_channels, mask=m_tells, other=0.0).to(ACC)
    noise_d = tl.load(auto_ptr + 3 * channels + o_channels, mask=m_tells, other=0.0).to(ACC)
    noise_r = tl.load(auto_ptr + 4 * channels + o_channels, mask=m_tells, other=0.0).to(ACC)
    log_std = 0.5 * tl.log(batch_var + number(eps, ACC))
    by_mean, by_log_std = batch_mean - last_mean, log_std - last_log_std
    change_d = by_mean * by_mean / (2.0 * (running_var + number(eps, ACC)))
    rate = tl.where(count > 0.0, tl.maximum(1.0 / tl.maximum(count, 1.0), number(RATE, ACC)), 0.0)
    noise_d += rate * (change_d - noise_d)
    noise_r += rate * (0.5 * by_log_std * by_log_std - noise_r)
    m_valid = m_tells & is_finite(batch_mean) & is_finite(log_std) & is_finite(noise_d) & is_finite(noise_r)
    tl.store(auto_ptr + o_channels, count + 1.0, mask=m_valid)
    tl.store(auto_ptr + channels + o_channels, batch_mean, mask=m_valid)
    tl.store(auto_ptr + 2 * channels + o_channels, log_std, mask=m_valid)
    tl.store(auto_ptr + 3 * channels + o_channels, noise_d, mask=m_valid)
    tl.store(auto_ptr + 4 * channels + o_channels, noise_r, mask=m_valid)


@triton.jit
def ramp_at(since, closed, final, ramp, ACC: tl.constexpr):
    """A limit ``since`` steps after the hold: ``closed`` before it, ``final`` after ``ramp`` more."""
    first, last = number(closed, ACC), number(final, ACC)
    steps = tl.cast(ramp, tl.int64)
    passed = tl.where(since < 0, 0, tl.where(since < steps, since, steps)).to(ACC)
    rising = first + (last - first) * (passed / tl.where(steps > 0, steps, 1).to(ACC))
    return tl.where(since < 0, first, tl.where(since < steps, rising, last))
