"""The library ``csrc/autograd``, where it has been built, and what it asks Python of kinds of calls that are new to it.

Ordinary calls (``node.py``) and the operators of compiled graphs (``ops.py``) then interpret no Python but their
callers'.
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
from .backends import layout, reference
from .backends.in_cpp import BackwardCall, Call, InCpp, whose

logger = logging.getLogger("brn_kernels")

MOST_KINDS = 4096  # of a backend, or an operator; further ones are Python's


@functools.cache
def module() -> Any:
    """The compiled module, or None. Loading it replaces the operators' implementations on CPUs and CUDA."""
    built = build.find()
    if isinstance(built, str) or built.autograd is None:
        return None
    loader = importlib.machinery.ExtensionFileLoader("brn_kernels_autograd", str(built.autograd))
    spec = importlib.util.spec_from_file_location("brn_kernels_autograd", built.autograd, loader=loader)
    assert spec is not None
    try:
        found = importlib.util.module_from_spec(spec)
    except ImportError as error:
        logger.warning("%s cannot be loaded, calls stay in Python: %s", built.autograd, error)
        return None
    found.on_new_kinds(prepare_forward_operator, prepare_backward_operator, MOST_KINDS)
    return found


def forward_of(backend: str, call: Call, wants_bits: bool = True) -> InCpp | None:
    """What C++ runs for such a forward by the backend of that name; None if it cannot."""
    kernels = backends.resolve(backend, call.x.device.type)
    return kernels.forward_in_cpp(call, wants_bits) if hasattr(kernels, "forward_in_cpp") else None


def backward_of(backend: str, call: BackwardCall) -> InCpp | None:
    """Likewise of a backward, of a dy that lies as y does."""
    kernels = backends.resolve(backend, call.x.device.type)
    return kernels.backward_in_cpp(call) if hasattr(kernels, "backward_in_cpp") else None


def shape_of_bits(x: Tensor, kept: bool) -> tuple[int, ...]:
    """Of the packed bits of a call, if there are any: no dimensions otherwise."""
    return tuple(layout.bits_shape(layout.layout_of(x))) if kept else ()


def prepare_forward_operator(backend: str, traced: bool, *arguments: Any) -> tuple[Any, ...] | None:
    """What C++ is told of a kind of call of ``ops.forward``, of those ``Call`` arguments; None: it is Python's."""
    call = Call(*arguments)
    found = forward_of(backend, call, wants_bits=not traced)
    return _told(found, call.x, not traced and reference.keeps_bits(call.residual, call.activation))


def prepare_backward_operator(backend: str, *arguments: Any) -> tuple[Any, ...] | None:
    """Likewise of ``ops.backward``, of ``BackwardCall`` arguments."""
    call = BackwardCall(*arguments)
    return _told(backward_of(backend, call), call.x, call.has_bits)


def _told(found: InCpp | None, x: Tensor, has_bits: bool) -> tuple[Any, ...] | None:
    if found is None:
        return None
    y = torch.empty_like(x, device="meta")
    return found.unless, shape_of_bits(x, has_bits), y, whose(found.kernels)
