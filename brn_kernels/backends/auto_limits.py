"""``ClipSchedule.auto()``: the clip limits of each channel from its own statistics, in plain PyTorch.

r and d exist to take the sampling noise of a batch out of its statistics. What else is in them, the lag of the running
statistics behind weights that move, is better left to the batch. So r and d may go as far as noise does, and no
further. Noise is what is new in every batch; per channel, with the statistics of batch t and the running ones from
before it::

    noise_d^2 = average of (mu_B[t] - mu_B[t-1])^2 / (2 sigma^2)            d_max = NOISE_WIDTHS * noise_d
    noise_r^2 = average of (log sigma_B[t] - log sigma_B[t-1])^2 / 2        r_max = exp(NOISE_WIDTHS * noise_r)

Half of the mean squared difference of successive values is the variance of noise, whatever slow change lies under it
(von Neumann 1941). The averages are of all differences until these are 1/RATE, then exponential. Until ``MIN_BATCHES``
batches have been seen the limits are closed. The limits of a batch come from the batches before it.

Running statistics that start at 0 and 1, or at those of a network that has not learnt yet, should not need 1/momentum
steps to forget it. So the weight of batch t in them is at least ``WARMUP / (t + WARMUP)``, t being
``num_batches_tracked``: all of the first batch, and the layer's momentum from step WARMUP/momentum on. A momentum of 0
(frozen statistics) and None (the plain average) are left as they are.

State: (5, C), float32 (float64 in a double model), zeros when nothing has been seen; the rows are named below.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOISE_WIDTHS = 2.0  # how far noise may carry d and log r, in standard deviations; measured, docs/auto-schedule.md
RATE = 0.02  # of a difference in the averages
MIN_BATCHES = 10  # before the averages are believed
WARMUP = 3.0  # batches; 1 would be the plain average, in which a network's first steps weigh too much

COUNT, BATCH_MEAN, BATCH_LOG_STD, NOISE_D, NOISE_R = range(5)  # the rows; those of noise are squares
ROWS = 5


def limits_of(state: Tensor, dtype: torch.dtype) -> Tensor:
    """r_max and d_max of each channel, (2, C), in ``dtype``."""
    count, _, _, noise_d, noise_r = state.to(dtype).unbind()
    widths = torch.where(count >= MIN_BATCHES, NOISE_WIDTHS, 0.0).to(dtype)
    return torch.stack([torch.exp(widths * noise_r.sqrt()), widths * noise_d.sqrt()])


def momentum_at(num_batches_tracked: Tensor, momentum: float, dtype: torch.dtype) -> Tensor:
    """The weight of the next batch in the running statistics, 0-d."""
    return (WARMUP / (num_batches_tracked.to(dtype) + WARMUP)).clamp(min=momentum)


def observe(
    state: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    m: Tensor | int,
    running_var: Tensor,
    eps: float,
) -> None:
    """Take a batch into ``state``, in place; ``running_var`` is that from before its update.

    A channel whose statistics are not finite, or of fewer than 2 values (``m``), stays as it is.
    """
    count, last_mean, last_log_std, noise_d, noise_r = state.to(batch_mean.dtype).unbind()
    log_std = 0.5 * torch.log(batch_var + eps)
    change_d = (batch_mean - last_mean).square() / (2 * (running_var.to(batch_mean.dtype) + eps))
    change_r = (log_std - last_log_std).square() / 2
    rate = torch.where(count > 0, (1 / count).clamp(min=RATE), 0)  # the first batch differs from nothing
    after = torch.stack(
        [
            count + 1,
            batch_mean,
            log_std,
            noise_d + rate * (change_d - noise_d),
            noise_r + rate * (change_r - noise_r),
        ]
    ).to(state.dtype)
    valid = torch.isfinite(after).all(0) & (m >= 2)
    state.copy_(torch.where(valid, after, state))
