"""The operators ``torch.ops.brn_kernels.forward`` and ``.backward``: schemas, implementations, fakes.

They are what a compiled graph contains. Autograd lies outside them (``autograd.py``); the backend is looked up when
they run, so a trace does not depend on the machine it was made on. Nor does it depend on how x lies in memory, which
the compiler may change (``flexible_layout``), so that no bits are packed in a trace. Arguments:
``backends/reference.py``, and ``traced``: whether the call comes from a trace (there ``checkpointing.py``, too, cannot
recognize that it is run again);
``process_group``: the name of the group whose batch it is (``distributed.py``), None: this process's own;
``coefficients``: (3, C), to be filled with the pivot, scale and shift that y is computed of (``recompute.py``; only for
calls that the backend's kernels do); ``auto_state``: (5, C), what automatic limits are computed of
(``backends/auto_limits.py``), updated in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from . import backends, cpp, distributed, observe
from .backends.layout import bits_shape, layout_of
from .backends.reference import keeps_bits, statistics_dtype

_operators = library.Library("brn_kernels", "DEF")
_SCHEMAS = {
    "forward": "(Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor(d!)? clipped,"
    " Tensor? limits, float[] schedule, float? momentum, float eps, str? activation, str backend, bool traced,"
    " str? process_group=None, Tensor(e!)? coefficients=None, Tensor(f!)? auto_state=None)"
    " -> (Tensor y, Tensor saved, Tensor bits)",
    "backward": "(Tensor dy, Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, Tensor saved,"
    " Tensor? bits, str? activation, bool needs_dx, bool needs_dresidual, str backend, str? process_group=None)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
}
for _name, _schema in _SCHEMAS.items():
    _operators.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    _operators.define(f"{_name}_in_python{_schema}")  # for what C++ leaves to Python


def forward_implementation(
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
    backend: str,
    traced: bool,
    process_group: str | None = None,
    coefficients: Tensor | None = None,
    auto_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``forward``, called directly: what the operator must have a tensor for is None where there is none."""
    if traced and torch._C._current_graph_task_id() != -1 and running_mean is not None:
        raise RuntimeError(
            "activation checkpointing together with torch.compile runs Batch Renormalization again after its running "
            "statistics have moved, which gives wrong gradients: leave the layer out of one of the two"
        )
    arguments = (
        x, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits, schedule,
        momentum, eps, activation,
    )  # fmt: skip
    kernels = backends.resolve(backend, x.device.type)
    if (group := distributed.group_of(process_group)) is not None:
        y, saved, bits = distributed.forward(kernels, group, *arguments, coefficients, auto_state)
        return y, saved, None if traced else bits
    others = {} if coefficients is None else {"coefficients": coefficients}  # only for backends that have kernels
    return kernels.forward(*arguments, **others, auto_state=auto_state, wants_bits=not traced)


def backward_implementation(
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
    backend: str,
    process_group: str | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """``backward``, likewise."""
    arguments = (
        dy, x, residual, mask, weight, bias, saved, bits, activation, needs_dx, needs_dresidual,
    )  # fmt: skip
    kernels = backends.resolve(backend, x.device.type)
    if (group := distributed.group_of(process_group)) is not None:
        return distributed.backward(kernels, group, *arguments)
    return kernels.backward(*arguments)


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, saved, bits = forward_implementation(x, *rest)
    return y, saved, x.new_empty(0, dtype=torch.uint8) if bits is None else bits


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    bits: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bits = None if bits is None or bits.numel() == 0 else bits  # ``forward`` returns an empty one
    dx, dweight, dbias, dresidual = backward_implementation(
        dy, x, residual, mask, weight, bias, saved, bits, *rest
    )  # fmt: skip
    return (
        x.new_empty(0) if dx is None else dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual,
    )  # fmt: skip


def _implement(name: str, in_python: Callable[..., tuple[Tensor, ...]]) -> None:
    """By C++ where it is built, which is loaded now and has the operator from the next call on."""

    def first(*arguments: Any) -> tuple[Tensor, ...]:
        cpp.module()
        return in_python(*arguments)

    _operators.impl(name, first, "CompositeExplicitAutograd")
    _operators.impl(f"{name}_in_python", in_python, "CompositeExplicitAutograd")


_implement("forward", _forward)
_implement("backward", _backward)


@library.register_fake("brn_kernels::forward", lib=_operators)
def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    activation, traced = rest[11], rest[13]
    channels = x.shape[1] if x.dim() > 1 else 0
    saved = x.new_empty(4, channels, dtype=statistics_dtype(x))
    kept = not traced and keeps_bits(residual, activation) and x.numel() > 0
    bits = x.new_empty(bits_shape(layout_of(x)) if kept else (0,), dtype=torch.uint8)
    return torch.empty_like(x), saved, bits


@library.register_fake("brn_kernels::backward", lib=_operators)
def _fake_backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved, _, _, needs_dx, needs_dresidual = arguments[4:9]
    dweight, dbias = saved.new_empty(saved.shape[1]), saved.new_empty(saved.shape[1])
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    dresidual = torch.empty_like(x) if needs_dresidual else x.new_empty(0)
    return dx, dweight, dbias, dresidual


_NAMES = tuple(argument.name for argument in torch.ops.brn_kernels.forward.default._schema.arguments)

forward = torch.ops.brn_kernels.forward.default
backward = torch.ops.brn_kernels.backward.default


def run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """``forward_implementation``: by way of the operator, which takes 10 us more, if anybody observes operators."""
    call = _by_operator if is_observed(arguments[0]) else forward_implementation
    if observe.observers and not torch.compiler.is_compiling():
        return observe.watched(functools.partial(call, *arguments), dict(zip(_NAMES, arguments, strict=False)))
    return call(*arguments)


def _by_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    y, saved, bits = forward(*arguments)
    return y, saved, bits if bits.numel() > 0 else None


def run_backward(*arguments: Any) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """``backward_implementation``, likewise."""
    dy = arguments[0]
    if not is_observed(dy) and not torch._C._functorch.is_legacy_batchedtensor(dy):  # of is_grads_batched
        return backward_implementation(*arguments)
    dx, dweight, dbias, dresidual = backward(*arguments)
    needs_dx, needs_dresidual = arguments[9:11]
    return dx if needs_dx else None, dweight, dbias, dresidual if needs_dresidual else None


def is_observed(x: Tensor) -> bool:
    """Whether anybody must see the operator itself: a trace, a dispatch mode, a tensor that is more than a tensor."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
