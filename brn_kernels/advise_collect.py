"""What the normalization layers of a model see: means and variances of batches and of samples, channel by channel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .advise_state import untouched
from .modules import BatchRenorm, closed_limits

INPUT_NAMES = ("x", "input", "inputs", "image", "images", "pixel_values", "data")


@dataclass(frozen=True)
class Observation:
    """One input of a layer: (C,) float64 tensors on the CPU, summed over its samples with their weights.

    A sample's weight is its share of the values (its unmasked ones), so weights sum to 1.
    """

    batch: int  # number of the batch
    samples: int
    values: int  # per channel
    inverse_count: float  # sum of squared weights: 1 / samples without a mask
    mean: Tensor
    square: Tensor  # mean of x squared, about ``mean``: the biased variance
    sample_square: Tensor  # weighted mean of the squared sample means, about ``mean``


@dataclass
class Collected:
    """All observations by layer name, in the order in which layers are first called."""

    layers: dict[str, list[Observation]] = field(default_factory=dict)
    batches: int = 0
    left_out: int = 0  # batches with fewer than two values per channel, which BatchNorm refuses
    not_finite: int = 0  # inputs of layers with NaN or Inf


class _TooFewValues(Exception):
    """A layer got one value per channel, or none."""


def is_norm(module: nn.Module) -> bool:
    """BatchNorm of any kind (SyncBatchNorm too) or Batch Renormalization."""
    return isinstance(module, (_BatchNorm, BatchRenorm))


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    max_batches: int,
) -> Collected:
    """Run up to ``max_batches`` batches in training mode, without gradients; the model is as before afterwards.

    Raises:
        ValueError: the model has no normalization layer; ``batches`` cannot be iterated over; a batch holds no input
            that can be told.
    """
    layers = {name or "(the model)": module for name, module in model.named_modules() if is_norm(module)}
    if not layers:
        raise ValueError("the model has no BatchNorm or Batch Renormalization layer")
    collected = Collected()
    run = _call if forward is None else forward
    # With open limits later layers would see our layers' running statistics move, as a trend.
    ours = [layer for layer in layers.values() if isinstance(layer, BatchRenorm)]
    with untouched(model), closed_limits(ours), torch.no_grad():
        try:
            iterator = iter(batches)  # in here, since a data loader draws its seed from torch's generator now
        except TypeError:
            if hasattr(batches, "__iter__"):
                raise  # the user's own error
            raise ValueError(f"batches must be an iterable of inputs, got {type(batches).__name__}") from None
        model.train()
        for name, layer in layers.items():
            layer.register_forward_pre_hook(_watch(name, collected), with_kwargs=True)
        for batch in itertools.islice(iterator, max_batches):
            seen = {name: len(observations) for name, observations in collected.layers.items()}
            try:
                run(model, batch)
            except _TooFewValues:
                collected.left_out += 1
                for name, observations in collected.layers.items():
                    del observations[seen.get(name, 0) :]
            collected.batches += 1
    return collected


def _watch(name: str, collected: Collected) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def before_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x", kwargs.get("input"))
        if not layer.training or not isinstance(x, Tensor) or x.dim() < 2:
            return
        if x.numel() == 0:
            raise _TooFewValues
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
        observation = observe(x, mask, collected.batches)
        if observation.values < 2:
            raise _TooFewValues
        if not bool((observation.mean + observation.square).isfinite().all()):
            collected.not_finite += 1
            return
        collected.layers.setdefault(name, []).append(observation)

    return before_forward


@torch.no_grad()
def observe(x: Tensor, mask: Tensor | None = None, batch: int = 0) -> Observation:
    """The observation that ``x``, (N, C, *spatial), gives.

    Args:
        x: the layer's input.
        mask: bool, (N, *spatial) or (N, 1, *spatial), True where a value counts.
        batch: its number.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], -1)
    if mask is None:
        variance, mean = torch.var_mean(x, dim=2, correction=0)
        counts = torch.full((len(x),), x.shape[2], dtype=torch.float64)
        mean, variance = mean.cpu().double(), variance.cpu().double()
    else:
        counted = mask.reshape(len(x), 1, -1)
        count = counted.sum(2)
        mean = torch.where(counted, x, 0).sum(2) / count.clamp(min=1)
        variance = torch.where(counted, x - mean[:, :, None], 0).square().sum(2) / count.clamp(min=1)
        counts, mean, variance = count[:, 0].cpu().double(), mean.cpu().double(), variance.cpu().double()
    weight = counts / counts.sum().clamp(min=1)
    batch_mean = weight @ mean
    sample_square = weight @ (mean - batch_mean).square()
    return Observation(
        batch=batch,
        samples=int((counts > 0).sum()),
        values=int(counts.sum()),
        inverse_count=float(weight.square().sum()),
        mean=batch_mean,
        square=weight @ variance + sample_square,
        sample_square=sample_square,
    )


def _call(model: nn.Module, batch: Any) -> Any:
    x = _input_of(batch)
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return model(x if first is None else x.to(first.device))


def _input_of(batch: Any) -> Tensor:
    """The tensor itself, the first of a tuple or list, the one of a usual name or the only floating one of a dict."""
    found = batch
    if isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    elif isinstance(batch, Mapping):
        named = [batch[name] for name in INPUT_NAMES if isinstance(batch.get(name), Tensor)]
        floating = [value for value in batch.values() if isinstance(value, Tensor) and value.is_floating_point()]
        found = named[0] if named else floating[0] if len(floating) == 1 else None
    if isinstance(found, Tensor):
        return found
    raise ValueError(
        f"a batch is a {type(batch).__name__} in which the model's input cannot be told: give a tensor, (input, ...), "
        f"a dict with a tensor under one of {', '.join(INPUT_NAMES)}, or forward=, called as forward(model, batch)"
    )
