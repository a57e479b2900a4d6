"""``BatchRenorm1d``, ``BatchRenorm2d`` and ``BatchRenorm3d``: drop-in replacements for PyTorch's BatchNorm layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import init
from torch.nn.modules.batchnorm import _NormBase

from . import distributed
from .backends import auto_limits
from .functional import check_activation, check_eps, renormalize
from .schedule import ClipSchedule, is_number

_WIDE = ("running_mean", "running_var", "auto_state")  # buffers that stay wide in a half model


class BatchRenorm(_NormBase):
    """Batch Renormalization over inputs of any rank from 2 (what a ``SyncBatchNorm`` is converted to).

    In training, with mu_B and sigma_B of the batch and mu and sigma from the running statistics before their update::

        r = clip(sigma_B / sigma, 1/r_max, r_max)        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = activation(weight * ((x - mu_B) / sigma_B * r + d) + bias + residual)

    No gradient flows through r and d. The limits follow ``schedule`` at ``num_batches_tracked``, on the device. In
    evaluation the layer is BatchNorm on the running statistics. Parameters, buffers and ``state_dict`` keys are those
    of :class:`torch.nn.BatchNorm2d`. ``running_mean`` and ``running_var`` are float32 (or float64) even in a half or
    bfloat16 model, whose small updates would otherwise be lost. The non-persistent buffer ``clipped``, (C,) bool, says
    which channels were clipped at the last step.

    Source: Ioffe, Batch Renormalization, 2017, algorithm 1.

    Args:
        num_features: C.
        eps: added to the variance; positive.
        momentum: weight of a batch in the running statistics; ``None`` for their cumulative average.
        affine: whether the layer has ``weight`` and ``bias``.
        track_running_stats: if False there are no running statistics, so the layer is BatchNorm on the batch.
        device: of parameters and buffers.
        dtype: of the parameters.
        bias: if False (and affine) the layer has only ``weight``.
        schedule: the clip limits over time; the paper's by default.
        activation: ``None``, ``"relu"``, ``"leaky_relu"``, ``"silu"`` or ``"hardswish"``, applied last.
        process_group: whose batches the statistics are of: a ``torch.distributed`` group, or ``None`` for this
            process's own batch. See :func:`brn_kernels.convert_sync`.

    Raises:
        ValueError: an argument out of its range.
    """

    clipped: Tensor | None
    auto_state: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        schedule: ClipSchedule | None = None,
        activation: str | None = None,
        process_group: Any = None,
    ) -> None:
        check_eps(eps)
        check_activation(activation)
        if momentum is not None and not (is_number(momentum) and math.isfinite(momentum)):
            raise ValueError(f"momentum must be None or a finite number, got {momentum!r}")
        if schedule is not None and not isinstance(schedule, ClipSchedule):
            raise ValueError(f"schedule must be a ClipSchedule, got {schedule!r}")
        process_group = distributed.name_of(process_group)
        momentum = None if momentum is None else float(momentum)
        super().__init__(num_features, float(eps), momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.process_group: str | None = process_group
        clipped = torch.zeros(num_features, dtype=torch.bool, device=device) if track_running_stats else None
        self.register_buffer("clipped", clipped, persistent=False)
        self.schedule = ClipSchedule.paper() if schedule is None else schedule
        self._widen_statistics()

    @property
    def schedule(self) -> ClipSchedule:
        """The clip limits over time. With ``ClipSchedule.auto()`` the layer has a buffer more, ``auto_state``."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: ClipSchedule) -> None:
        if not isinstance(schedule, ClipSchedule):
            raise ValueError(f"schedule must be a ClipSchedule, got {schedule!r}")
        self._schedule = schedule
        if not schedule.adapts or self.running_mean is None:
            self.register_buffer("auto_state", None)  # absent from the state_dict
        elif self._buffers.get("auto_state") is None:
            self.register_buffer("auto_state", self._fresh_auto_state())

    def auto_limits(self) -> tuple[Tensor, Tensor]:
        """``(r_max, d_max)`` that ``ClipSchedule.auto()`` gives each channel for the next batch: (C,) each.

        Raises:
            ValueError: the layer has another schedule, or no running statistics.
        """
        if self.auto_state is None:
            raise ValueError(
                "auto_limits is for layers with ClipSchedule.auto() and running statistics; this one has "
                f"schedule={self.schedule}, track_running_stats={self.track_running_stats}"
            )
        r_max, d_max = auto_limits.limits_of(self.auto_state, self.auto_state.dtype).unbind()
        return r_max, d_max

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        activation: str | None = None,
    ) -> Tensor:
        """Normalize ``x``; in training also update the running statistics.

        Args:
            x: input of the layer's rank, (N, C, *spatial).
            residual: added before the activation; x's shape and dtype.
            mask: bool, (N, *spatial) or (N, 1, *spatial), True where a value counts; the output is 0 elsewhere.
            activation: for this call, instead of the layer's own (``brn_kernels.fuse`` gives it the one that follows).

        Returns:
            x's shape, dtype and memory format.

        Raises:
            ValueError: an argument of the wrong rank, shape, dtype or device, or one value per channel in training;
                nothing has been updated then.
        """
        if type(x) is not Tensor and type(self).forward is BatchRenorm.forward and is_one_node(self, x):
            return as_one_node(self, x, residual=residual, mask=mask, activation=activation)
        if activation is None:
            activation = self.activation
        else:
            check_activation(activation)
        self._check_input_dim(x)
        parameters, buffers = self._parameters, self._buffers  # looking them up by attribute takes 10 us of a call
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        training = self.training or (running_mean is None and running_var is None)
        tracked = self.track_running_stats or not training
        schedule = self._schedule
        return renormalize(
            x, residual, mask,
            parameters["weight"] if "weight" in parameters else self.weight,  # not there if parametrized
            parameters["bias"] if "bias" in parameters else self.bias,
            running_mean if tracked else None,
            running_var if tracked else None,
            buffers["num_batches_tracked"] if tracked else None,
            buffers["clipped"] if tracked else None,
            None, schedule.numbers, self.momentum, self.eps, activation, training, self.process_group,
            buffers["auto_state"] if tracked and schedule.adapts else None,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Forget the statistics; set ``weight`` to 1 and ``bias`` to 0."""
        self.reset_running_stats()
        if self.affine:
            init.ones_(self.weight)
            if self.bias is not None:
                init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0 and variance 1 and the number of batches to 0."""
        super().reset_running_stats()
        clipped = self._buffers.get("clipped")  # not there yet while the base class is being constructed
        if clipped is not None:
            clipped.zero_()
        auto_state = self._buffers.get("auto_state")
        if auto_state is not None:
            auto_state.zero_()

    def ends_with_normalization(self) -> bool:
        """Whether nothing follows the normalization, so that a residual and an activation can."""
        return self.activation is None and type(self).forward is BatchRenorm.forward

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``print(model)``."""
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}, schedule={self.schedule}"
        )
        for name in ("activation", "process_group"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchRenorm:
        before = {name: self._buffers[name] for name in _WIDE}
        super()._apply(fn, recurse)
        self._widen_statistics(before)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._load_auto_state(state_dict, prefix, missing_keys, unexpected_keys)
        self._widen_statistics()  # loading with assign=True puts the checkpoint's tensors in place
        running_mean, clipped = self.running_mean, self.clipped
        if running_mean is not None and clipped is not None and clipped.device != running_mean.device:
            self.clipped = torch.zeros_like(clipped, device=running_mean.device)

    def _load_auto_state(
        self, state_dict: Mapping[str, Any], prefix: str, missing_keys: list[str], unexpected_keys: list[str]
    ) -> None:
        """A checkpoint without the state (BatchNorm's, another schedule's) begins it anew; one too many is ignored."""
        key = f"{prefix}auto_state"
        if self.auto_state is None:
            if key in unexpected_keys:
                unexpected_keys.remove(key)
        elif key not in state_dict and f"{prefix}running_mean" in state_dict:
            if key in missing_keys:
                missing_keys.remove(key)
            self._buffers["auto_state"] = self._fresh_auto_state()

    def _fresh_auto_state(self) -> Tensor:
        running_mean = self._buffers["running_mean"]
        assert running_mean is not None
        dtype = torch.float64 if running_mean.dtype == torch.float64 else torch.float32
        return torch.zeros(auto_limits.ROWS, self.num_features, dtype=dtype, device=running_mean.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickle from before layers could have ``auto_state``, too."""
        state = dict(state)
        if "schedule" in state:
            state["_schedule"] = state.pop("schedule")
            state["_buffers"] = {**state["_buffers"], "auto_state": None}
        super().__setstate__(state)

    def _widen_statistics(self, before: Mapping[str, Tensor | None] | None = None) -> None:
        """Hold half and bfloat16 statistics as float32, with the values of the tensors given, if any."""
        for name in _WIDE:
            statistic, wide = self._buffers[name], before[name] if before else None
            if statistic is not None and statistic.dtype in (torch.float16, torch.bfloat16):
                source = statistic if wide is None or wide.is_meta else wide
                self._buffers[name] = source.to(device=statistic.device, dtype=torch.float32)


def is_one_node(layer: Any, x: Any) -> bool:
    """Whether ``torch.fx`` is tracing a module that calls ``layer``: x then has no shape and dtype to check."""
    return isinstance(x, Proxy) and getattr(x.tracer, "root", None) is not layer


def as_one_node(layer: Any, x: Any, **others: Any) -> Any:
    """The call of ``layer`` as one node of the graph being traced, as a call of a layer of PyTorch is."""
    given = {name: value for name, value in others.items() if value is not None}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), given)


class BatchRenorm1d(BatchRenorm):
    """Batch Renormalization of (N, C) or (N, C, L) inputs; arguments of :class:`BatchRenorm`.

    Raises:
        ValueError: an argument out of its range, or an input of another rank.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in (2, 3):
            raise ValueError(f"expected 2D or 3D input (got {x.dim()}D input)")


class BatchRenorm2d(BatchRenorm):
    """Batch Renormalization of (N, C, H, W) inputs; arguments of :class:`BatchRenorm`.

    Raises:
        ValueError: an argument out of its range, or an input of another rank.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")


class BatchRenorm3d(BatchRenorm):
    """Batch Renormalization of (N, C, D, H, W) inputs; arguments of :class:`BatchRenorm`.

    Raises:
        ValueError: an argument out of its range, or an input of another rank.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() != 5:
            raise ValueError(f"expected 5D input (got {x.dim()}D input)")


@contextlib.contextmanager
def closed_limits(layers: Iterable[BatchRenorm]) -> Iterator[None]:
    """The layers normalize by batch statistics alone, as BatchNorm does; their schedules and states are kept."""
    schedules = {layer: layer.schedule for layer in layers}
    try:
        for layer in schedules:
            layer._schedule = ClipSchedule.batchnorm()  # not the property: ``auto_state`` must stay the same tensor
        yield
    finally:
        for layer, schedule in schedules.items():
            layer._schedule = schedule
