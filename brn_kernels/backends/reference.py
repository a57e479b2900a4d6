"""The specification: Batch Renormalization in plain PyTorch, on any device, in the paper's names.

Every other backend computes what this file says. Shapes: ``x``, ``residual``, ``y``, ``dy`` are (N, C, *spatial);
``mask`` is a bool tensor that broadcasts to them (True: the value counts); everything per channel is (C,).
Statistics and the arithmetic are float32, or float64 for float64 input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schedule import limits_at
from . import auto_limits, layout

LEAKY_RELU_SLOPE = 0.01  # nn.LeakyReLU's default


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics of ``x`` are computed and saved."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    clipped: Tensor | None,
    limits: Tensor | None,
    schedule: list[float],
    momentum: float | None,
    eps: float,
    activation: str | None,
    auto_state: Tensor | None = None,
    wants_bits: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalize in training mode and update the running statistics in place.

    The clip limits are those of ``auto_state`` (``auto_limits.py``; updated in place) if given; else ``limits``
    (r_max, d_max) if given; else those of ``schedule`` at ``num_batches_tracked``.

    Returns:
        y; and for the backward ``saved``, (4, C): batch_mean, inv_std, r, d; and ``bits``: where a ReLU after a
        residual lets the gradient through (``layout.pack_bits``), None without that, or where nobody wants them.
    """
    y = torch.empty_like(x)
    if x.numel() == 0:
        if num_batches_tracked is not None:
            num_batches_tracked += 1
        channels = x.shape[1] if x.dim() > 1 else 0
        return y, torch.zeros(4, channels, dtype=statistics_dtype(x), device=x.device), None

    batch_mean, batch_var, m = batch_statistics(x, mask)
    saved, is_clipped = corrected(
        batch_mean, batch_var, running_mean, running_var, num_batches_tracked, limits, schedule, eps, auto_state
    )
    bits = write(y, x, residual, mask, weight, bias, saved, activation)
    update(
        batch_mean, batch_var, m, is_clipped, running_mean, running_var, num_batches_tracked, clipped, momentum, eps,
        auto_state,
    )  # fmt: skip
    return y, saved, bits if wants_bits else None


def backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    bits: Tensor | None,
    activation: str | None,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """The gradients of ``forward``'s y, with r and d as constants. Where ``bits`` is kept, residual is not needed.

    Returns:
        dx, dweight, dbias, dresidual; dx and dresidual are None where they are not needed.
    """
    dx = torch.empty_like(x) if needs_dx else None
    dresidual = torch.empty_like(x) if needs_dresidual else None
    _, _, r, d = saved.unbind()
    if x.numel() == 0:
        return dx, torch.zeros_like(r), torch.zeros_like(r), dresidual

    dy, x_bn = upstream(dy, x, residual, mask, weight, bias, saved, bits, activation)
    S1, S2 = dy.sum(reduced_dims(x)), (dy * x_bn).sum(reduced_dims(x))
    if dx is not None:
        m: Tensor | int = x.numel() // x.shape[1] if mask is None else mask.sum().clamp(min=1).to(saved.dtype)
        dx.copy_(gradient_of_x(dy, x_bn, mask, weight, saved, S1 / m, S2 / m))
    if dresidual is not None:
        dresidual.copy_(dy)
    return dx, r * S2 + d * S1, S1, dresidual


def batch_statistics(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """mu_B, the biased var_B, and the number of values per channel, m (a 0-d tensor with a mask)."""
    x, dims = x.to(statistics_dtype(x)), reduced_dims(x)
    if mask is None:
        batch_mean = x.mean(dims)
        return batch_mean, (x - per_channel(batch_mean, x)).square().mean(dims), x.numel() // x.shape[1]
    m = mask.sum().to(x.dtype)
    batch_mean = torch.where(mask, x, 0).sum(dims) / m.clamp(min=1)
    centered = torch.where(mask, x - per_channel(batch_mean, x), 0)
    return batch_mean, centered.square().sum(dims) / m.clamp(min=1), m


def corrected(
    batch_mean: Tensor,
    batch_var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    limits: Tensor | None,
    schedule: list[float],
    eps: float,
    auto_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``saved``, (4, C): batch_mean, inv_std, r, d; and whether r or d was clipped, (C,)."""
    inv_std = torch.rsqrt(batch_var + eps)
    if running_mean is None or running_var is None:
        r, d = torch.ones_like(batch_mean), torch.zeros_like(batch_mean)
        is_clipped = torch.zeros_like(batch_mean, dtype=torch.bool)
    else:
        if auto_state is not None:
            limits = auto_limits.limits_of(auto_state, batch_mean.dtype)
        if limits is None:
            step = num_batches_tracked
            if step is None:
                step = torch.zeros((), dtype=torch.long, device=batch_mean.device)
            r_max, d_max = limits_at(step, schedule, batch_mean.dtype)
        else:
            r_max, d_max = limits.to(batch_mean.dtype).unbind()
        r, d, is_clipped = correction(batch_mean, batch_var, running_mean, running_var, r_max, d_max, eps)
    return torch.stack([batch_mean, inv_std, r, d]), is_clipped


def correction(
    batch_mean: Tensor,
    batch_var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    r_max: Tensor,
    d_max: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """r, d, and whether either was clipped, per channel (paper, algorithm 1)."""
    batch_std = torch.sqrt(batch_var + eps)
    running_std = torch.sqrt(running_var.to(batch_var.dtype) + eps)
    r = batch_std / running_std
    d = (batch_mean - running_mean.to(batch_mean.dtype)) / running_std
    is_clipped = (r > r_max) | (r < 1 / r_max) | (d.abs() > d_max)
    r, d = r.clamp(1 / r_max, r_max).detach(), d.clamp(-d_max, d_max).detach()
    return r, d, is_clipped


def write(
    y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    activation: str | None,
) -> Tensor | None:
    """Write y; return the ``bits`` for the backward."""
    z = normalize(x, residual, weight, bias, *saved.unbind())
    bits = layout.pack_bits(~(z <= 0), x) if keeps_bits(residual, activation) else None
    z = activate(z, activation)
    y.copy_(z if mask is None else torch.where(mask, z, 0))
    return bits


def update(
    batch_mean: Tensor,
    batch_var: Tensor,
    m: Tensor | int,
    is_clipped: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    clipped: Tensor | None,
    momentum: float | None,
    eps: float,
    auto_state: Tensor | None = None,
) -> None:
    """Move the running statistics, the counter, the clipped flags and the state of automatic limits, in place."""
    if running_mean is not None and running_var is not None:
        if auto_state is not None:
            auto_limits.observe(auto_state, batch_mean, batch_var, m, running_var, eps)
        factor: Tensor | float
        if momentum is None:  # a cumulative average
            assert num_batches_tracked is not None
            factor = 1 / (num_batches_tracked + 1).to(batch_mean.dtype)
        elif auto_state is not None and momentum > 0 and num_batches_tracked is not None:
            factor = auto_limits.momentum_at(num_batches_tracked, momentum, batch_mean.dtype)
        else:
            factor = momentum
        finite = torch.isfinite(batch_mean) & torch.isfinite(batch_var)
        has_variance = torch.ones_like(finite) & (m >= 2)  # one value, or none, says nothing about a variance
        unbiased_var = batch_var * (m / (m - 1 + (m < 2)))
        update_running(running_mean, batch_mean, factor, finite & has_variance)
        update_running(running_var, unbiased_var, factor, finite & has_variance)
        if clipped is not None:
            clipped.copy_(torch.where(has_variance, is_clipped | ~finite, clipped))
    if num_batches_tracked is not None:
        num_batches_tracked += 1


def normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_mean: Tensor,
    inv_std: Tensor,
    r: Tensor,
    d: Tensor,
) -> Tensor:
    """Return gamma * (x_bn * r + d) + beta + residual, the activation's input, in the statistics' dtype."""
    dtype = batch_mean.dtype
    z = (x.to(dtype) - per_channel(batch_mean, x)) * per_channel(inv_std * r, x) + per_channel(d, x)
    if weight is not None:
        z = z * per_channel(weight.to(dtype), x)
    if bias is not None:
        z = z + per_channel(bias.to(dtype), x)
    return z if residual is None else z + residual.to(dtype)


def upstream(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    bits: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """dy', which is dy after the activation's derivative, and x_bn; in the statistics' dtype, 0 where masked."""
    batch_mean, inv_std, r, d = saved.unbind()
    dy = dy.to(saved.dtype)
    if bits is not None:
        dy = torch.where(layout.unpack_bits(bits, x), dy, 0)
    elif activation is not None:
        z = normalize(x, residual, weight, bias, batch_mean, inv_std, r, d)
        dy = activation_backward(dy, z, activation)
    x_bn = (x.to(saved.dtype) - per_channel(batch_mean, x)) * per_channel(inv_std, x)
    return (dy, x_bn) if mask is None else (torch.where(mask, dy, 0), torch.where(mask, x_bn, 0))


def gradient_of_x(
    dy: Tensor,
    x_bn: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    saved: Tensor,
    mean_S1: Tensor,
    mean_S2: Tensor,
) -> Tensor:
    """Return gamma * r / sigma_B * (dy' - S1/m - x_bn * S2/m), from dy' and x_bn; 0 where masked."""
    _, inv_std, r, _ = saved.unbind()
    scale = r * inv_std if weight is None else weight.to(saved.dtype) * r * inv_std
    centered = dy - per_channel(mean_S1, dy) - x_bn * per_channel(mean_S2, dy)
    return per_channel(scale, dy) * (centered if mask is None else torch.where(mask, centered, 0))


def composed(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Compute y of differentiable operations, r and d being constants: derivatives of any order follow from it."""
    _, _, r, d = saved.unbind()
    if mask is not None:  # what is masked may hold anything: keep it out of the derivatives too
        x = torch.where(mask, x, 0)
        residual = None if residual is None else torch.where(mask, residual, 0)
    batch_mean, batch_var, _ = batch_statistics(x, mask)
    inv_std = torch.rsqrt(batch_var + eps)
    y = activate(normalize(x, residual, weight, bias, batch_mean, inv_std, r, d), activation)
    return (y if mask is None else torch.where(mask, y, 0)).to(x.dtype)


def read_again(residual: Tensor | None, activation: str | None) -> Tensor | None:
    """The residual, if the backward must read it."""
    return None if activation is None or keeps_bits(residual, activation) else residual


def keeps_bits(residual: Tensor | None, activation: str | None) -> bool:
    """Whether the forward keeps ``bits``, so that the backward needs no residual."""
    return residual is not None and activation == "relu"


def update_running(running: Tensor, batch: Tensor, factor: Tensor | float, valid: Tensor) -> None:
    """In place, running += factor * (batch - running), where ``valid`` and where the result can be held."""
    before = running.to(batch.dtype)
    after = (before + factor * (batch - before)).to(running.dtype)
    running.copy_(torch.where(valid & torch.isfinite(after), after, running))


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The activation of that name, or z itself for None."""
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, LEAKY_RELU_SLOPE)
    if activation == "silu":
        return F.silu(z)
    if activation == "hardswish":
        return z * F.relu6(z + 3) / 6  # F.hardswish takes a float32 sixth for float64 on GPUs
    return z


def activation_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """Multiply dy by the activation's derivative at z, with PyTorch's conventions at the kinks."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(dy, z, 0)
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(dy, z, LEAKY_RELU_SLOPE, False)
    if activation == "silu":
        return aten.silu_backward(dy, z)
    return aten.hardswish_backward(dy, z)


def reduced_dims(x: Tensor) -> list[int]:
    """Every dimension but the channels'."""
    return [i for i in range(x.dim()) if i != 1]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), to broadcast against ``x``."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
