"""How far a layer's batch statistics stray from the population's, and why: sampling, composition, trend."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from .advise_collect import Observation


@dataclass(frozen=True)
class LayerAdvice:
    """What one layer's batches showed. Root mean squares over channels and batches, in population deviations.

    Attributes:
        layer: its name in the model.
        samples: median samples of a batch.
        effective_count: as many independent values as a batch mean is worth, ``1 / noise ** 2``.
        d: batch means from the population's, ``(mu_B - mu) / sigma``.
        noise: what iid batches of this size would show of d.
        excess: of d beyond noise, the trend left out: the composition of batches.
        drift: of d beyond noise, the trend over the batches.
        neumann: mean squared successive difference over variance of batch means: 2 without a trend, 0 for a smooth one.
        log_r: root mean square of log r, ``r = sigma_B / sigma``.
        d_high: 99 % of abs(d) are below it.
        r_high: 99 % of r and of 1 / r are below it.
    """

    layer: str
    samples: int
    effective_count: float
    d: float
    noise: float
    excess: float
    drift: float
    neumann: float
    log_r: float
    d_high: float
    r_high: float


def summarize(name: str, seen: list[Observation]) -> LayerAdvice | None:
    """The numbers of one layer, from its observations, in float64; None if its input is constant."""
    means = torch.stack([o.mean for o in seen])
    squares = torch.stack([o.square for o in seen])
    values = torch.tensor([o.values for o in seen], dtype=torch.float64)
    share = (values / values.sum())[:, None]
    mean = (share * means).sum(0)
    between = (share * (means - mean).square()).sum(0)
    variance = (share * squares).sum(0) + between
    resolved = torch.maximum(1e-12 * variance.max(), 1e-14 * mean.square())  # float32 tells no less from a constant
    alive = variance > resolved
    if not bool(alive.any()):
        return None
    means, squares, mean, variance = means[:, alive], squares[:, alive], mean[alive], variance[alive]
    sample_variance = (share * torch.stack([o.sample_square for o in seen])[:, alive]).sum(0) + between[alive]
    samples = sum(o.samples for o in seen)
    sample_variance = sample_variance * (samples / (samples - 1))
    noise = float((sample_variance / variance).mean()) * statistics.fmean(o.inverse_count for o in seen)

    d = (means - mean) / variance.sqrt()
    observed = float((d - d.mean(0)).square().sum(0).mean()) / (len(seen) - 1)
    by_batch = _by_batch(d, [o.batch for o in seen])
    steps = float(by_batch.diff(dim=0).square().mean())
    spread = float(by_batch.var(0).mean())
    neumann = steps / spread if spread > 0 else 2.0
    beyond = max(observed - noise, 0.0)
    drift = min(max(spread - steps / 2, 0.0), beyond)
    r = (squares / variance).sqrt().clamp(min=1e-6)
    return LayerAdvice(
        layer=name,
        samples=int(statistics.median(o.samples for o in seen)),
        effective_count=1 / noise if noise > 0 else math.inf,
        d=math.sqrt(observed),
        noise=math.sqrt(noise),
        excess=math.sqrt(beyond - drift),
        drift=math.sqrt(drift),
        neumann=neumann,
        log_r=float(r.log().square().mean().sqrt()),
        d_high=_quantile(d.abs()),
        r_high=_quantile(torch.maximum(r, 1 / r)),
    )


def _by_batch(d: Tensor, numbers: list[int]) -> Tensor:
    """One row a batch: the average over a layer's calls in it."""
    _, index = torch.unique(torch.tensor(numbers), return_inverse=True)
    rows = torch.zeros(int(index.max()) + 1, d.shape[1], dtype=d.dtype).index_add_(0, index, d)
    return rows / index.bincount()[:, None]


def _quantile(values: Tensor) -> float:
    """99 % are below; by sorting, since torch.quantile refuses long inputs."""
    ordered = values.flatten().sort().values
    return float(ordered[math.ceil(0.99 * len(ordered)) - 1])


def in_all(layers: tuple[LayerAdvice, ...]) -> LayerAdvice:
    """Root mean squares over the layers; medians of samples and Neumann's ratio; the widest quantiles."""

    def rms(name: str) -> float:
        return math.sqrt(statistics.fmean(getattr(layer, name) ** 2 for layer in layers))

    noise = rms("noise")
    return LayerAdvice(
        layer="all",
        samples=int(statistics.median(layer.samples for layer in layers)),
        effective_count=1 / noise**2 if noise > 0 else math.inf,
        neumann=statistics.median(layer.neumann for layer in layers),
        noise=noise,
        **{name: rms(name) for name in ("d", "excess", "drift", "log_r")},
        **{name: max(getattr(layer, name) for layer in layers) for name in ("d_high", "r_high")},
    )
