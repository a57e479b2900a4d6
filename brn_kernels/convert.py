"""From BatchNorm layers to Batch Renormalization and back, anywhere in a model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook

from . import distributed
from .backends import reference
from .fused_call import activation_name, is_untouched
from .fused_class import restore_classes
from .modules import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, as_one_node, is_one_node
from .schedule import ClipSchedule

_Model = TypeVar("_Model", bound=nn.Module)
FUSED_BATCHNORM = "is_fused_batchnorm"  # set on a layer that ``brn_kernels.fuse`` made of a BatchNorm
FUSES_ACTIVATION = "fuses_activation"  # set on a layer with an ``act`` of its own that ``brn_kernels.fuse`` fused


def convert_batchnorm(model: _Model, *, schedule: ClipSchedule | None = None, momentum: float | None = 0.01) -> _Model:
    """Replace every BatchNorm layer in ``model`` by Batch Renormalization, in place.

    Converts ``nn.BatchNorm1d/2d/3d``, ``nn.SyncBatchNorm`` (which keeps its process group), lazy ones once
    materialized, and timm's ``BatchNormAct2d`` and ``SyncBatchNormAct`` (which keep their ``drop`` and ``act``).
    Parameters and statistics are kept by identity (an optimizer made before goes on working; half statistics become
    float32), and so are hooks, the training flag, eps and everything else set on the layer. ``num_batches_tracked`` is
    kept too: the schedule continues from it.

    Args:
        model: any module; if it is itself a BatchNorm layer, use what is returned.
        schedule: the clip limits over time; the paper's by default.
        momentum: of the new layers, ``None`` for a cumulative average. Not taken from the old ones: PyTorch's 0.1
            follows single batches too closely to be normalized by.

    Returns:
        ``model``, or the new layer if ``model`` is one.

    Raises:
        ValueError: a lazy layer has not been materialized, a layer's eps is not positive, or a layer was compiled by
            itself; nothing is converted then.

    Warns:
        UserWarning: a subclass of BatchNorm that is not known here was left as it is.
    """
    schedule = ClipSchedule.paper() if schedule is None else schedule

    def converted(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, _BatchNorm):
            return None
        if isinstance(layer, LazyModuleMixin):
            raise ValueError(f"{type(layer).__name__} has no shape yet: run a batch through the model, then convert it")
        new_type = renorm_type(layer)
        if new_type is None or "forward" in vars(layer):
            warnings.warn(f"{type(layer).__name__} left as it is: not a BatchNorm known to behave alike", stacklevel=4)
            return None
        return renorm_of(layer, new_type, schedule, momentum)

    model = replace_layers(model, converted)
    for layer in model.modules():
        if isinstance(layer, BatchRenorm) and layer.__dict__.pop(FUSED_BATCHNORM, False):
            layer.schedule, layer.momentum = schedule, momentum
    return model


def renorm_of(
    layer: _BatchNorm, new_type: type[BatchRenorm], schedule: ClipSchedule, momentum: float | None
) -> BatchRenorm:
    """A Batch Renormalization layer with all that the BatchNorm ``layer`` carries."""
    new = new_type(layer.num_features, layer.eps, momentum, schedule=schedule, device="meta")
    if isinstance(layer, nn.SyncBatchNorm):
        new.process_group = distributed.name_of(layer.process_group) or distributed.DEFAULT_GROUP
    _move(layer, new, leave=("momentum", "process_group"))
    running_mean, clipped = new.running_mean, None
    if running_mean is not None:
        clipped = torch.zeros(new.num_features, dtype=torch.bool, device=running_mean.device)
    new.register_buffer("clipped", clipped, persistent=False)
    new.schedule = schedule  # again, for its buffer: the old layer's have taken the place of all that there were
    new._widen_statistics()
    return new


def revert_to_batchnorm(model: _Model) -> _Model:
    """Replace every Batch Renormalization layer in ``model`` by BatchNorm, in place: for deployment.

    In evaluation mode the model computes the same as before. Kept: what :func:`convert_batchnorm` keeps, momentum
    too. A layer with an activation becomes a subclass of its BatchNorm that activates (and takes a residual). A plain
    BatchNorm takes neither ``residual`` nor ``mask``: a model that passes these calls the layers as they are.

    Args:
        model: any module; if it is itself a Batch Renormalization layer, use what is returned.

    Returns:
        ``model``, or the new layer if ``model`` is one.

    Raises:
        ValueError: the statistics of a half layer do not fit its dtype (BatchNorm wants one dtype for all); nothing is
            reverted then.

    Warns:
        UserWarning: a subclass of ``BatchRenorm`` that is not known here was left as it is.
    """

    def reverted(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, BatchRenorm):
            return None
        new = None if "forward" in vars(layer) else batchnorm_of(layer)
        if new is None:
            warnings.warn(f"{type(layer).__name__} left as it is: not a layer of brn_kernels", stacklevel=4)
        return new

    model = replace_layers(model, reverted)
    restore_classes(model)
    return model


def batchnorm_of(layer: BatchRenorm) -> _BatchNorm | None:
    """A BatchNorm layer with all that the Batch Renormalization ``layer`` carries; None for a subclass unknown here."""
    new_type = _batchnorm_type(layer)
    if new_type is None:
        return None
    new = new_type(layer.num_features, device="meta")
    if isinstance(new, nn.SyncBatchNorm):
        new.process_group = distributed.group_of(layer.process_group)
    leave = ("_schedule", "clipped", "auto_state", "process_group", FUSED_BATCHNORM, FUSES_ACTIVATION)
    _move(layer, new, leave=leave if layer.activation else (*leave, "activation"))
    _narrow_statistics(new)
    return new


def convert_sync(model: _Model, process_group: Any = None) -> _Model:
    """Let every Batch Renormalization layer of ``model`` use the batch of all processes of a group, in place.

    What ``nn.SyncBatchNorm.convert_sync_batchnorm`` is to BatchNorm: statistics, r, d and gradients are those of the
    group's batches taken together; these may differ in size, or be empty. Every process must run the layers in the same
    order. In evaluation nothing is exchanged, nor where ``torch.distributed`` is not initialized.

    Args:
        model: any module; BatchNorm layers in it are left alone (``convert_batchnorm`` them first).
        process_group: the group; ``None`` for the default group of the process that trains.

    Returns:
        ``model``.

    Raises:
        ValueError: ``process_group`` is no group, or this process is not a member of it.
    """
    name = distributed.name_of(process_group) or distributed.DEFAULT_GROUP
    for layer in model.modules():
        if isinstance(layer, BatchRenorm):
            layer.process_group = name
    return model


class _DropAndAct:
    """What timm's ``BatchNormAct2d`` adds to a BatchNorm: ``act(drop(y))``."""

    drop: nn.Module
    act: nn.Module
    activation: str | None
    fuses_activation = False

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        activation: str | None = None,
    ) -> Tensor:
        if is_one_node(self, x):
            return as_one_node(self, x, residual=residual, mask=mask, activation=activation)
        if self.fuses_activation and activation is None and (name := self.fusible_activation()) is not None:
            return super().forward(x, residual, mask, activation=name)  # type: ignore[misc]
        y = super().forward(x, residual, mask, activation=activation)  # type: ignore[misc]
        return self.act(self.drop(y))

    def fusible_activation(self) -> str | None:
        """The activation that can be computed with the normalization, if there is one."""
        return None if self.activation is not None else fusible_activation(self)

    def ends_with_normalization(self) -> bool:
        return self.activation is None and all(
            type(each) is nn.Identity and is_untouched(each) for each in (self.drop, self.act)
        )


def fusible_activation(layer: Any) -> str | None:
    """The activation of a layer with ``drop`` and ``act`` that can be computed with the normalization, or None."""
    plain = type(layer.drop) is nn.Identity and is_untouched(layer.drop) and is_untouched(layer.act)
    return activation_name(layer.act) if plain and not _has_any_global_hook() else None


class BatchRenormAct2d(_DropAndAct, BatchRenorm2d):
    """What timm's ``BatchNormAct2d`` is converted to."""


class BatchRenormAct(_DropAndAct, BatchRenorm):
    """What timm's ``SyncBatchNormAct`` is converted to."""


class _Activating:
    """A BatchNorm that adds a residual and activates, as the layer it was reverted from did."""

    activation: str

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_one_node(self, x):
            return as_one_node(self, x, residual=residual)
        y = super().forward(x)  # type: ignore[misc]
        return reference.activate(y if residual is None else y + residual, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"  # type: ignore[misc]


class ActivatingBatchNorm1d(_Activating, nn.BatchNorm1d):
    """What a ``BatchRenorm1d`` with an activation is reverted to."""


class ActivatingBatchNorm2d(_Activating, nn.BatchNorm2d):
    """What a ``BatchRenorm2d`` with an activation is reverted to."""


class ActivatingBatchNorm3d(_Activating, nn.BatchNorm3d):
    """What a ``BatchRenorm3d`` with an activation is reverted to."""


class ActivatingSyncBatchNorm(_Activating, nn.SyncBatchNorm):
    """What a ``BatchRenorm`` with an activation is reverted to."""


_RENORM_OF: dict[type[nn.Module], type[BatchRenorm]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
    nn.SyncBatchNorm: BatchRenorm,
    ActivatingBatchNorm1d: BatchRenorm1d,
    ActivatingBatchNorm2d: BatchRenorm2d,
    ActivatingBatchNorm3d: BatchRenorm3d,
    ActivatingSyncBatchNorm: BatchRenorm,
}
_RENORM_OF_TIMM: dict[str, type[BatchRenorm]] = {
    "BatchNormAct2d": BatchRenormAct2d,
    "SyncBatchNormAct": BatchRenormAct,
}
_BATCHNORM_OF: dict[type[nn.Module], tuple[type[_BatchNorm], type[_BatchNorm]]] = {  # without, with an activation
    BatchRenorm1d: (nn.BatchNorm1d, ActivatingBatchNorm1d),
    BatchRenorm2d: (nn.BatchNorm2d, ActivatingBatchNorm2d),
    BatchRenorm3d: (nn.BatchNorm3d, ActivatingBatchNorm3d),
    BatchRenorm: (nn.SyncBatchNorm, ActivatingSyncBatchNorm),
}
_TIMM_NAME_OF = {renorm: name for name, renorm in _RENORM_OF_TIMM.items()}


def renorm_type(layer: _BatchNorm) -> type[BatchRenorm] | None:
    """What a BatchNorm layer is converted to; None for a subclass unknown here."""
    layer_type = type(layer)
    if layer_type.__module__.startswith("timm."):
        return _RENORM_OF_TIMM.get(layer_type.__name__)
    return _RENORM_OF.get(layer_type)


def _batchnorm_type(layer: BatchRenorm) -> type[_BatchNorm] | None:
    if name := _TIMM_NAME_OF.get(type(layer)):
        import timm.layers

        return getattr(timm.layers, name)
    plain, activating = _BATCHNORM_OF.get(type(layer), (None, None))
    return plain if layer.activation is None else activating


def replace_layers(model: _Model, replacement: Callable[[nn.Module], nn.Module | None]) -> _Model:
    """Put ``replacement(layer)`` for each layer where that is not None: all are made before any is put in place."""
    new = {layer: made for layer in model.modules() if (made := replacement(layer)) is not None}
    own = [
        module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)
    ]  # which can be changed
    for wrapper in own:
        compiled = wrapper._modules.get("_orig_mod")  # what torch.compile wraps
        if compiled is not None and compiled in new:
            raise ValueError(f"a {type(compiled).__name__} was compiled by itself: replace it before that")
    for parent in own:
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)  # type: ignore[return-value]


def _move(old: nn.Module, new: nn.Module, leave: tuple[str, ...]) -> None:
    """Give ``new`` all that ``old`` carries (hooks, flags, parameters, buffers), by identity, except ``leave``."""
    for name, value in vars(old).items():
        if name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = {key: item for key, item in value.items() if key not in leave}
        elif name == "_non_persistent_buffers_set":
            new.__dict__[name] = value - set(leave)
        elif name not in leave:
            new.__dict__[name] = value
    for hook in new._load_state_dict_pre_hooks.values():  # these know their module
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]
    if getattr(old, "_compiled_call_impl", None) is not None:  # it would go on calling the old layer
        new._compiled_call_impl = None
        warnings.warn(f"{type(old).__name__} was compiled: compile what replaces it again", stacklevel=4)


def _narrow_statistics(layer: _NormBase) -> None:
    """Give the statistics the parameters' dtype, if that is a half: BatchNorm's kernels want one dtype."""
    parameter = layer.weight
    if parameter is None or parameter.dtype not in (torch.float16, torch.bfloat16):
        return
    for name in ("running_mean", "running_var"):
        wide = layer._buffers[name]
        if wide is None:
            continue
        narrow = wide.to(parameter.dtype)
        if not narrow.is_meta and bool((narrow.isinf() & wide.isfinite()).any()):
            raise ValueError(f"{name} does not fit {parameter.dtype}: call model.float() before reverting")
        layer._buffers[name] = narrow
