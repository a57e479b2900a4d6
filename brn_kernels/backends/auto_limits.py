"""``ClipSchedule.auto()``: the clip limits of each channel from its own statistics, in plain PyTorch.

r and d exist to take the sampling noise of a batch out of its statistics. What else is in them, the lag of the running
statistics behind weights that move, is better left to the batch. The two are told apart by time: noise is new in every
batch, lag stays. Per channel, with the statistics of batch t and the running ones from before it::

    d = (mu_B - mu) / sigma                                  log_r = log(sigma_B / sigma)
    noise_d^2 = average of (mu_B[t] - mu_B[t-1])^2 / (2 sigma^2)
    noise_r^2 = average of (log sigma_B[t] - log sigma_B[t-1])^2 / 2
    lag_d, lag_r = average of d, of log_r
    d_max = max(0, NOISE_WIDTHS * noise_d - abs(lag_d))      r_max = exp(max(0, NOISE_WIDTHS * noise_r - abs(lag_r)))

Half of the mean squared difference of successive values is the variance of noise, whatever slow change lies under it
(von Neumann 1941). The averages are of all batches until these are 1/RATE, then exponential. Until ``MIN_BATCHES`` have
been seen the limits are closed. The limits of a batch come from the batches before it.

State: (7, C), float32 (float64 in a double model), zeros when nothing has been seen; the rows are named below.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOISE_WIDTHS = 3.0  # how far noise may carry d and log r: all but 0.3 % of a normal distribution's values
RATE = 0.02  # of a batch in the averages
MIN_BATCHES = 10  # before the averages are believed

COUNT, BATCH_MEAN, BATCH_LOG_STD, NOISE_D, NOISE_R, LAG_D, LAG_R = range(7)  # rows; the noises are squares
ROWS = 7


def limits_of(state: Tensor, dtype: torch.dtype) -> Tensor:
    """r_max and d_max of each channel, (2, C), in ``dtype``."""
    count, _, _, noise_d, noise_r, lag_d, lag_r = state.to(dtype).unbind()
    seen = count >= MIN_BATCHES
    d_max = torch.where(seen, (NOISE_WIDTHS * noise_d.sqrt() - lag_d.abs()).clamp(min=0), 0)
    log_r_max = torch.where(seen, (NOISE_WIDTHS * noise_r.sqrt() - lag_r.abs()).clamp(min=0), 0)
    return torch.stack([log_r_max.exp(), d_max])


def observe(
    state: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    m: Tensor | int,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> None:
    """Take a batch into ``state``, in place; the running statistics are those from before their update.

    A channel whose statistics are not finite, or of fewer than 2 values (``m``), stays as it is.
    """
    before = state.to(batch_mean.dtype)
    count, last_mean, last_log_std, noise_d, noise_r, lag_d, lag_r = before.unbind()
    running_std = torch.sqrt(running_var.to(batch_mean.dtype) + eps)
    log_std = 0.5 * torch.log(batch_var + eps)
    d = (batch_mean - running_mean.to(batch_mean.dtype)) / running_std
    log_r = log_std - torch.log(running_std)
    rate = (1 / (count + 1)).clamp(min=RATE)
    difference_rate = torch.where(count > 0, (1 / count.clamp(min=1)).clamp(min=RATE), 0)  # the first batch has none
    after = torch.stack(
        [
            count + 1,
            batch_mean,
            log_std,
            noise_d + difference_rate * (((batch_mean - last_mean) / running_std).square() / 2 - noise_d),
            noise_r + difference_rate * ((log_std - last_log_std).square() / 2 - noise_r),
            lag_d + rate * (d - lag_d),
            lag_r + rate * (log_r - lag_r),
        ]
    ).to(state.dtype)
    valid = torch.isfinite(after).all(0) & (m >= 2)
    state.copy_(torch.where(valid, after, state))
