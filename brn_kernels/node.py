"""Ordinary training calls with the backward in C++ (``csrc/autograd``), where that has been built.

``BatchRenormFunction`` does the same everywhere; but PyTorch runs a GPU's backwards in a thread of their own, and to
interpret Python there takes a fifth of a small layer's time (``brn bench host``).
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from . import backends, build
from .autograd import gradients
from .backends import layout, reference

logger = logging.getLogger("brn_kernels")

MOST_PLANS = 4096  # the C++ frees none; calls of further kinds have their backward in Python

_plans: dict[tuple[Any, ...], int] = {}


@functools.cache
def module() -> Any:
    """The compiled module, or None."""
    built = build.find()
    if isinstance(built, str) or built.autograd is None:
        return None
    loader = importlib.machinery.ExtensionFileLoader("brn_kernels_autograd", str(built.autograd))
    spec = importlib.util.spec_from_file_location("brn_kernels_autograd", built.autograd, loader=loader)
    assert spec is not None
    try:
        return importlib.util.module_from_spec(spec)
    except ImportError as error:
        logger.warning("%s cannot be loaded, backwards stay in Python: %s", built.autograd, error)
        return None


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rest: tuple[Any, ...],
    auto_state: Tensor | None,
) -> Tensor | None:
    """The ordinary call's y, its backward in C++; None, and nothing done, if that cannot be.

    Args:
        x: of the call.
        residual: of the call.
        weight: of the call.
        bias: of the call.
        rest: the arguments of ``ops.forward`` from ``running_mean`` to ``backend``.
        auto_state: of the call.
    """
    compiled = module()
    if compiled is None:
        return None
    eps, activation, backend = rest[7:10]
    kernels = backends.resolve(backend, x.device.type)
    if not hasattr(kernels, "backward_kernels") or not _are_dense(weight, bias):
        return None
    key = (
        backend, kernels, x.shape, x.stride(), x.dtype, x.device, x.requires_grad, eps, activation,
        None if residual is None else (residual.stride(), residual.requires_grad),
        None if weight is None else weight.dtype, None if bias is None else bias.dtype,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(compiled, kernels, x, residual, weight, bias, eps, activation, backend)
        if plan is None:
            return None
        _plans[key] = plan
    torch._C._set_grad_enabled(False)
    try:
        y, saved, bits = kernels.forward(x, residual, None, weight, bias, *rest[:9], auto_state=auto_state)
    finally:
        torch._C._set_grad_enabled(True)  # as in every ordinary call
    return compiled.remember(plan, y, x, residual, weight, bias, saved, bits)


def _are_dense(weight: Tensor | None, bias: Tensor | None) -> bool:
    return (weight is None or weight.is_contiguous()) and (bias is None or bias.is_contiguous())


def _plan(
    compiled: Any,
    kernels: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    backend: str,
) -> int | None:
    """Which kernels the backward launches, if it launches any (yet)."""
    if len(_plans) >= MOST_PLANS:
        return None
    bits = reference.keeps_bits(residual, activation)
    saves_residual = residual is not None and activation is not None and not bits
    needs_dresidual = residual is not None and residual.requires_grad and activation is not None
    found = kernels.backward_kernels(
        x, residual if saves_residual else None, weight, bias, activation, bits, x.requires_grad, needs_dresidual
    )
    if found is None:
        return None
    in_python = functools.partial(
        gradients, eps=eps, activation=activation, backend=backend,
        channels_last=layout.layout_of(x).channels_last if bits else None,
    )  # fmt: skip
    return compiled.new_plan(
        in_python,
        x,
        residual,
        weight,
        bias,
        saves_residual,
        activation is None,
        x.requires_grad,
        needs_dresidual,
        found,
    )
