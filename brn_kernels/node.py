"""Ordinary training calls in C++ (``csrc/autograd``), where that has been built: their forward and their backward.

``functional.py`` and ``BatchRenormFunction`` do the same everywhere; but to interpret Python takes longer than a small
layer's kernels, and PyTorch runs a GPU's backwards in a thread of their own (``brn bench host``).
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
from typing import Any

from . import backends, build, observe
from .autograd import gradients
from .backends import layout, reference
from .backends.in_cpp import Call, whose

logger = logging.getLogger("brn_kernels")

MOST_PLANS = 4096  # of a backend; C++ frees none. Calls of further kinds are Python's.

_plans: dict[str, Any] = {}  # by the name of a backend


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
        logger.warning("%s cannot be loaded, calls stay in Python: %s", built.autograd, error)
        return None


def forget() -> None:
    """Make no further use of the plans so far, which hold what launches were when they were made."""
    _plans.clear()


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
    bits = reference.keeps_bits(residual, activation)
    passes_dy_on = activation is None
    needs_dresidual = residual is not None and residual.requires_grad and not passes_dy_on
    kernels = backends.resolve(backend, x.device.type)
    found = kernels.in_cpp(call, x.requires_grad, needs_dresidual) if hasattr(kernels, "in_cpp") else None
    if found is None:
        return False
    seen_as = layout.layout_of(x)
    in_python = functools.partial(
        gradients, eps=call.eps, activation=activation, backend=backend,
        channels_last=seen_as.channels_last if bits else None,
    )  # fmt: skip
    saves_residual = residual is not None and activation is not None and not bits
    made = (
        in_python, found.unless, saves_residual, passes_dy_on, needs_dresidual,
        tuple(layout.bits_shape(seen_as)) if bits else (), whose(found.forward), whose(found.backward),
    )  # fmt: skip
    module().prepare(_plans_of(backend), call, made)
    return True


def _plans_of(backend: str) -> Any:
    plans = _plans.get(backend)
    return plans if plans is not None else _plans.setdefault(backend, module().new_plans(observe.observers, MOST_PLANS))
