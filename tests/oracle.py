"""Batch Renormalization once more, from the paper's formulas, in float64, by autograd with r and d detached.

Shares no arithmetic with the library. It carries its state from step to step, as a layer does.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


@dataclass
class Oracle:
    channels: int
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    momentum: float | None = 0.01
    eps: float = 1e-5
    activation: str | None = None
    r_max: float = 3.0
    d_max: float = 5.0
    hold: int = 0
    r_ramp: int = 0
    d_ramp: int = 0
    t: int = 0
    clipped: torch.Tensor = field(init=False)
    r: torch.Tensor = field(init=False)
    d: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.running_mean = torch.zeros(self.channels, dtype=torch.float64)
        self.running_var = torch.ones(self.channels, dtype=torch.float64)

    def limits(self):
        if self.t < self.hold:
            return 1.0, 0.0
        since = self.t - self.hold
        r = self.r_max if since >= self.r_ramp else 1 + (self.r_max - 1) * since / self.r_ramp
        d = self.d_max if since >= self.d_ramp else self.d_max * since / self.d_ramp
        return r, d

    def __call__(self, x, residual=None, mask=None):
        """One training step on float64 tensors; mask broadcasts to x."""
        shape = [1, -1] + [1] * (x.dim() - 2)
        dims = [0, *range(2, x.dim())]
        valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
        m = valid.sum(dims)
        mu_B = torch.where(valid, x, 0).sum(dims) / m
        var_B = torch.where(valid, (x - mu_B.view(shape)) ** 2, 0).sum(dims) / m
        sigma_B = (var_B + self.eps).sqrt()
        sigma = (self.running_var + self.eps).sqrt()
        r_max, d_max = self.limits()
        r, d = (sigma_B / sigma).detach(), ((mu_B - self.running_mean) / sigma).detach()
        self.clipped = (r > r_max) | (r < 1 / r_max) | (d.abs() > d_max)
        self.r, self.d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        y = (x - mu_B.view(shape)) / sigma_B.view(shape) * self.r.view(shape) + self.d.view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        if residual is not None:
            y = y + residual
        y = torch.where(valid, ACTIVATIONS[self.activation](y), 0)
        factor = 1 / (self.t + 1) if self.momentum is None else self.momentum
        with torch.no_grad():
            self.running_mean = self.running_mean + factor * (mu_B - self.running_mean)
            self.running_var = self.running_var + factor * (var_B * m / (m - 1) - self.running_var)
        self.t += 1
        gamma = torch.ones_like(sigma_B) if self.weight is None else self.weight
        self.gain = (gamma.abs() * self.r / sigma_B).max().item()  # of dy to dx
        self.offset = (x.abs().amax(dims) / sigma_B).max().item()  # what rounding errors of x grow by, normalized
        return y

    def scales(self, y, dy, x):
        """The largest values that enter each result of the last step: what its rounding errors are relative to."""
        largest_dy = dy.abs().max().item()
        reduced = x.numel() / self.channels * largest_dy * (1 + self.offset) * (1 + self.d.abs().max().item())
        return {
            "y": max(y.abs().max().item(), self.gain * x.abs().max().item()),
            "dx": self.gain * largest_dy * (1 + self.offset),
            "dweight": reduced,
            "dbias": reduced,
            "dresidual": largest_dy,
        }
