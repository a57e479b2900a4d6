"""Ordinary training calls in C++ (``csrc/autograd``), where that has been built: their forward and their backward.

``functional.py`` and ``BatchRenormFunction`` do the same everywhere; but to interpret Python takes longer than a small
layer's kernels, and PyTorch runs a GPU's backwards in a thread of their own (``brn bench host``).
"""

from __future__ import annotations

import functools
from typing import Any

from . import observe
from .autograd import gradients
from .backends import layout, reference
from .backends.in_cpp import BackwardCall, Call, whose
from .cpp import MOST_KINDS, backward_of, forward_of, module, shape_of_bits

_plans: dict[str, Any] = {}  # by the name of a backend


def forget() -> None:
    """Make no further use of the plans so far, which hold what launches were when they were made."""
    _plans.clear()
    if (cpp := module()) is not None:
        cpp.forget_operators()


def forward(backend: str, *call: Any) -> Any:
    """Y of a :class:`Call` by the backend of that name; or, and nothing done, None: the call is Python's.

    ``NotImplemented`` is returned where ``prepare`` may change that, once the call has been found to be valid. There
    must be a ``module()``.
    """
    return module().forward(_plans_of(backend), *call)


def prepare(backend: str, *arguments: Any) -> bool:
    """Tell C++ what it needs to know of such calls, if it can do them; whether it can.

    Args:
        backend: the same name.
        arguments: those of a call for which ``forward`` has returned ``NotImplemented``; they are valid.
    """
    call = Call(*arguments)
    x, residual, activation = call.x, call.residual, call.activation
    has_bits = reference.keeps_bits(residual, activation)
    passes_dy_on = activation is None
    needs_dresidual = residual is not None and residual.requires_grad and not passes_dy_on
    read = reference.read_again(residual, activation)
    of_backward = BackwardCall(
        x, read, call.weight, call.bias, activation, has_bits, x.requires_grad, needs_dresidual
    )  # fmt: skip
    forwards, backwards = forward_of(backend, call), backward_of(backend, of_backward)
    if forwards is None or backwards is None:
        return False
    in_python = functools.partial(
        gradients, eps=call.eps, activation=activation, backend=backend,
        channels_last=layout.layout_of(x).channels_last if has_bits else None,
    )  # fmt: skip
    made = (
        in_python, forwards.unless, read is not None, passes_dy_on, needs_dresidual, shape_of_bits(x, has_bits),
        whose(forwards.kernels), whose(backwards.kernels),
    )  # fmt: skip
    module().prepare(_plans_of(backend), call, made)
    return True


def _plans_of(backend: str) -> Any:
    plans = _plans.get(backend)
    return plans if plans is not None else _plans.setdefault(backend, module().new_plans(observe.observers, MOST_KINDS))
