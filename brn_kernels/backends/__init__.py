"""Which backend computes: chosen by the user, or for the device at hand.

A backend is a module of this package with ``forward`` and ``backward`` (signatures: ``reference.py``, the
specification); except for the reference, also ``unusable(device_type)``, which says why it cannot run there, and
``is_fused(x, residual, mask, activation)``, which says whether its kernels do such a call or leave it to the reference;
and ``forward_in_cpp`` and ``backward_in_cpp``, what C++ runs instead (``in_cpp.py``). Of a call that its kernels do,
``forward`` takes one argument more, ``coefficients``, (3, C), and fills it with the pivot, scale and shift of
``y = activation((x - pivot) * scale + shift + residual)``; where there was no residual, ``apply(x, coefficients,
activation)`` computes the same y again, to the bit.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType, TracebackType

import torch

logger = logging.getLogger("brn_kernels")

ENVIRONMENT_VARIABLE = "BRN_KERNELS_BACKEND"
PREFERENCE = ("triton", "native", "reference")  # the fastest first

_selected = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"  # checked when first used


def available_backends() -> dict[str, str | None]:
    """Every backend, and why it cannot run on this machine's devices (``None``: it can).

    Returns:
        ``{"triton": reason or None, "native": ..., "reference": None}``, the preferred first.
    """
    devices = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        devices.insert(0, accelerator.type)
    return {name: _unusable_everywhere(name, devices) for name in PREFERENCE}


class use_backend:  # noqa: N801  (a function to its callers, like torch.set_grad_enabled)
    """Choose the backend, for the whole process: ``use_backend("reference")``, or ``with use_backend("reference"):``.

    As a call it holds until the next one; as a context manager it restores the choice before it. The environment
    variable ``BRN_KERNELS_BACKEND`` makes the choice of a process that calls nothing.

    Args:
        name: ``"auto"`` (the fastest that runs on the input's device), ``"triton"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: that backend cannot run on this machine; the message says why.
    """

    def __init__(self, name: str) -> None:
        global _selected
        _check_name(name)
        if name != "auto" and (reason := available_backends()[name]):
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
        self._before, _selected = _selected, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        global _selected
        _selected = self._before


def selected() -> str:
    """The name in force: what ``use_backend`` chose last, else the environment variable's, else ``"auto"``."""
    return _selected


def resolve(name: str, device_type: str) -> ModuleType:
    """The backend called ``name`` for tensors on ``device_type``; ``"auto"`` takes the first that can run.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it cannot run on such a device; the message says why.
    """
    return _resolve(name, device_type)


@functools.cache
def _resolve(name: str, device_type: str) -> ModuleType:
    _check_name(name)
    if name != "auto":
        if reason := _unusable(name, device_type):
            raise RuntimeError(f"backend {name!r} cannot run on {device_type}: {reason}")
        return _load(name)
    passed_over = {}
    for candidate in PREFERENCE:
        reason = _unusable(candidate, device_type)
        if reason is None and candidate == "triton" and device_type == "cpu":
            reason = "interpreted on a CPU, so only if asked for by name"
        if reason:
            passed_over[candidate] = reason
            continue
        if candidate == "reference":
            reasons = "; ".join(f"{other}: {why}" for other, why in passed_over.items())
            logger.warning("using the reference backend (plain PyTorch) on %s. %s", device_type, reasons)
        return _load(candidate)
    raise AssertionError("the reference backend runs everywhere")


def _check_name(name: str) -> None:
    if name not in ("auto", *PREFERENCE):
        source = f" (from {ENVIRONMENT_VARIABLE})" if name == os.environ.get(ENVIRONMENT_VARIABLE) else ""
        raise ValueError(f"backend must be one of {', '.join(('auto', *PREFERENCE))}; got {name!r}{source}")


def _load(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


def _unusable(name: str, device_type: str) -> str | None:
    """Why the backend cannot run on that type of device; None if it can."""
    if importlib.util.find_spec(f".{name}", __name__) is None:
        return "not part of this version of brn_kernels"
    try:
        backend = _load(name)
    except ImportError as error:
        return str(error)
    return backend.unusable(device_type) if hasattr(backend, "unusable") else None


def _unusable_everywhere(name: str, devices: list[str]) -> str | None:
    reasons = {device: _unusable(name, device) for device in devices}
    if None in reasons.values():
        return None
    return "; ".join(dict.fromkeys(str(reason) for reason in reasons.values()))
