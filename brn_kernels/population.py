"""Running statistics from a whole data set, as after averaging weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from .modules import BatchRenorm, closed_limits


@torch.no_grad()
def update_stats(model: nn.Module, loader: Iterable[Any], device: torch.device | str | int | None = None) -> None:
    """Set running statistics to the average over all batches of ``loader``.

    For models whose statistics no longer belong to their weights (weight averaging, SWA). It is
    :func:`torch.optim.swa_utils.update_bn`, which does not know our layers, for Batch Renormalization and BatchNorm
    layers alike. While it runs, layers normalize by batch statistics alone, since the old running ones are not to be
    trusted. ``num_batches_tracked`` of our layers is kept (the schedule goes on where it was), and so is every
    module's training flag. If anything fails, every layer is as it was before. A batch that a channel's statistics
    cannot use (NaN, all masked) still counts: with m batches, the initial values 0 and 1 then take 1/m of the average
    if it is the first one.

    Args:
        model: called as ``model(batch)``, in training mode, without gradients.
        loader: yields tensors, or lists or tuples whose first element is the input.
        device: where inputs are moved first, if given.

    Raises:
        ValueError: ``loader`` yields nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, (BatchRenorm, _BatchNorm)) and m.running_mean is not None]
    if not layers:
        return
    training = {module: module.training for module in model.modules()}
    ours = [layer for layer in layers if isinstance(layer, BatchRenorm)]
    momenta = [layer.momentum for layer in layers]
    statistics = [_copy(layer) for layer in layers]
    batches, complete = 0, False
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        model.train()
        with closed_limits(ours):
            for batch in loader:
                x = batch[0] if isinstance(batch, (list, tuple)) else batch
                model(x if device is None else x.to(device))
                batches += 1
        if batches == 0:
            raise ValueError("loader yielded no batch: the statistics are as they were")
        complete = True
    finally:
        for module, flag in training.items():
            module.training = flag
        for layer, momentum, before in zip(layers, momenta, statistics, strict=True):
            layer.momentum = momentum
            if not complete:
                _restore(layer, before)
            elif isinstance(layer, BatchRenorm):
                _restore(layer, {name: before[name] for name in _KEPT if name in before})


_KEPT = ("num_batches_tracked", "clipped", "auto_state")  # what belongs to training, not to the statistics


def _copy(layer: _NormBase) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}


def _restore(layer: _NormBase, before: dict[str, Tensor]) -> None:
    for name, value in before.items():
        getattr(layer, name).copy_(value)
