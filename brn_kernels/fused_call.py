"""What a fused model calls: a norm with what follows it, in one call where that is possible at that moment.

Whatever the model has become since it was fused (another activation, a hook, a residual that broadcasts), the result
is that of the modules called one after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .backends.reference import LEAKY_RELU_SLOPE, activate
from .modules import BatchRenorm

Activation = str | nn.Module | None

ADDITIONS: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "iadd": operator.iadd}


def activation_name(activation: Activation) -> str | None:
    """The fused activation that ``activation`` is; None if it is none of them."""
    if activation is None or isinstance(activation, str):
        return activation
    kind = type(activation)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.Hardswish:
        return "hardswish"
    if kind is nn.LeakyReLU and activation.negative_slope == LEAKY_RELU_SLOPE:
        return "leaky_relu"
    return None


def is_transparent(module: nn.Module) -> bool:
    """Whether the module returns its input: ``nn.Identity``, and stochastic depth that never drops."""
    if type(module) is nn.Identity:
        return True
    name, package = type(module).__name__, type(module).__module__.partition(".")[0]  # neither is imported here
    return (
        package == "torchvision" and name == "StochasticDepth" and getattr(module, "p", 1) == 0
        or package == "timm" and name == "DropPath" and getattr(module, "drop_prob", 1) == 0
    )  # fmt: skip


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module means no more than its class's forward: no hook, not patched, not compiled."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def is_sequential(module: nn.Module) -> bool:
    """Whether the module calls its children one after the other, fused or not."""
    return isinstance(module, nn.Sequential) and getattr(type(module), "_brn_original", type(module)).forward is (
        nn.Sequential.forward
    )


def _steps(module: nn.Module) -> list[nn.Module]:
    """What a Sequential calls, in order; a module that occurs twice (``children()`` has it once) is called twice."""
    return [child for child in module._modules.values() if child is not None]


def ends_with_normalization(module: nn.Module) -> bool:
    """Whether what the module returns comes straight from a norm that can take a residual and an activation."""
    if not is_untouched(module):
        return False
    if isinstance(module, BatchRenorm):
        return module.ends_with_normalization()
    if is_sequential(module):
        return len(module._modules) > 0 and ends_with_normalization(_steps(module)[-1])
    return getattr(type(module), "_brn_ending", None) is not None


def norm_add_act(
    module: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    activation: Activation,
    addition: str = "add",
    between: tuple[nn.Module, ...] = (),
) -> Tensor:
    """``activation(module(x) + residual)``, as one call of the norm that ``module`` is, or ends with, if possible.

    Args:
        module: a norm, or what ends with one.
        x: its input.
        residual: added; None for no addition.
        activation: a module, or the name of a function; None for none.
        addition: how the model adds: ``"add"``, ``"iadd"`` (into the norm's output), ``"iadd_residual"`` (into it).
        between: modules between the norm and the addition, or the activation, that returned their input.

    Returns:
        What the modules return when called one after the other.
    """
    name = activation_name(activation)
    possible = (
        (activation is None or name is not None)
        and (residual is None or name in (None, "relu"))
        and (not isinstance(activation, nn.Module) or is_untouched(activation))
        and not _has_any_global_hook()
        and ends_with_normalization(module)
    )
    for each in between:
        possible = possible and is_transparent(each) and is_untouched(each)
    if possible:
        y, done = finish(module, x, residual, name)
        if done:
            return y
    else:
        y = module(x)
    for each in between:
        y = each(y)
    if residual is not None:
        if addition == "iadd_residual":
            residual += y
            y = residual
        else:
            y = ADDITIONS[addition](y, residual)
    if isinstance(activation, nn.Module):
        return activation(y)
    return activate(y, activation)


def finish(module: nn.Module, x: Tensor, residual: Tensor | None, activation: str | None) -> tuple[Tensor, bool]:
    """``module(x)``, and whether the residual and the activation are already in it.

    ``module`` ends with a norm; what lies on the way to that norm is run here rather than called.
    """
    if isinstance(module, BatchRenorm):
        if residual is not None and not _fits(x, residual):
            return module(x), False
        return module(x, residual=residual, activation=activation), True
    if is_sequential(module):
        *first, last = _steps(module)
        fused = getattr(type(module), "_brn_original", None) is not None
        x = run_sequence(first, x) if fused else _run_plainly(first, x)
        if not ends_with_normalization(last):  # a child has changed it while it ran
            return last(x), False
        return finish(last, x, residual, activation)
    return type(module)._brn_ending(module, x, residual, activation)  # type: ignore[attr-defined]


def end(
    module: nn.Module, x: Tensor, residual: Tensor | None, activation: str | None, between: tuple[nn.Module, ...] = ()
) -> tuple[Tensor, bool]:
    """``finish`` for a forward that ends with ``module`` and then modules that return their input."""
    possible = ends_with_normalization(module)
    for each in between:
        possible = possible and is_transparent(each) and is_untouched(each)
    y, done = finish(module, x, residual, activation) if possible else (module(x), False)
    if not done:
        for each in between:
            y = each(y)
    return y, done


def run_sequence(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Call the modules one after the other, each norm together with the activation after it."""
    modules = list(modules)
    i = 0
    while i < len(modules):
        module, activation, after = modules[i], None, i + 1
        if ends_with_normalization(module):
            while after < len(modules) and is_transparent(modules[after]):
                after += 1
            if after < len(modules) and activation_name(modules[after]) is not None:
                activation = modules[after]
        if activation is None:
            x = module(x)
            i += 1
        else:
            x = norm_add_act(module, x, None, activation, between=tuple(modules[i + 1 : after]))
            i = after + 1
    return x


def _run_plainly(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _fits(x: Tensor, residual: Any) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a tensor, and no stand-in of a tracer."""
    return isinstance(x, torch.Tensor)
