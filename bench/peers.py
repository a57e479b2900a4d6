"""What a user would pick instead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm, then + residual, then ReLU, as ``what`` says: "plain", "relu" or "add" (which has both)."""

    def __init__(self, channels: int, what: str) -> None:
        super().__init__()
        self.norm, self.what = nn.BatchNorm2d(channels), what

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if self.what == "add":
            y = y + residual
        return y if self.what == "plain" else F.relu(y)


def compiled(model: nn.Module) -> nn.Module:
    """The model compiled for itself: without the reset, dynamo gives up after 8 layers that share their code."""
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False, fullgraph=True)


class TorchBatchRenorm(nn.Module):
    """Batch Renormalization as one writes it from the paper: PyTorch's operations, differentiated by autograd."""

    def __init__(self, channels: int, what: str, r_max: float = 3.0, d_max: float = 5.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.what, self.r_max, self.d_max = what, r_max, d_max

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        std, running_std = (var + 1e-5).sqrt(), (self.running_var + 1e-5).sqrt()
        with torch.no_grad():
            r = (std / running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
            self.running_mean.lerp_(mean, 0.01)
            self.running_var.lerp_(var, 0.01)
        scale = self.weight * r / std
        shift = self.weight * d + self.bias - mean * scale
        y = (x * scale[:, None, None] + shift[:, None, None]).to(dtype)
        return y if self.what == "plain" else F.relu(y)
