"""The forward of one module as a graph, its children being single nodes, and what must hold for it to stay true.

``torch.fx`` follows one path through the forward. What decides the path is recorded and becomes conditions of the
fused forward; where that cannot be done the trace is refused.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.graph import _format_target
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode

from .fused_class import original_class

_is_grad_enabled = torch.is_grad_enabled
_is_inference_mode_enabled = torch.is_inference_mode_enabled
_is_autocast_enabled = torch.is_autocast_enabled
_NOT_WATCHED = frozenset(dir(nn.Module())) - {"training"}  # what PyTorch itself keeps in a module


@dataclass
class Trace:
    """A graph of calls of children and functions, and when it says what the forward does."""

    graph: Graph
    parameters: list[inspect.Parameter]  # of the forward, without self
    required: list[str]  # those that are nodes of the graph; the others keep their defaults
    conditions: list[str]  # Python expressions over self and the parameters
    imports: list[str]


def trace(module: nn.Module) -> Trace:
    """Trace the forward that the module's own class gives it.

    Raises:
        Exception: what the forward, or the tracer, raised; its text is the reason.
    """
    known = _KNOWN.get(f"{original_class(module).__module__}.{original_class(module).__qualname__}")
    tracer = _OneLevel(module, *known or (original_class(module).forward, {}))
    graph = tracer.trace(module)
    return Trace(graph, tracer.parameters, tracer.required, tracer.conditions, tracer.imports)


class _TensorProxy(Proxy):
    """Says that it is a tensor, as forwards ask; the fused forward asks the same of what it is given."""

    _is_param = False

    @property
    def __class__(self) -> type:
        return Tensor

    @__class__.setter
    def __class__(self, _: type) -> None:
        raise TypeError("the class of a proxy is fixed")


def _recorded_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
):
    # torch.fx would take x += y for x = x + y
    setattr(_TensorProxy, f"__i{_name}__", _recorded_in_place(getattr(operator, f"i{_name}")))


class _OneLevel(Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, function: Any, input_conditions: dict[str, str]) -> None:
        super().__init__()
        if not isinstance(function, types.FunctionType):
            raise TraceError("its forward is no Python function")
        self.function = function
        # a decorator's own signature, not that of what it wraps
        _, *self.parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        self.required: list[str] = []
        self.conditions: list[str] = []
        self.imports: list[str] = []
        for parameter in self.parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TraceError(f"its forward takes *{parameter.name}")
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise TraceError(f"its forward takes {parameter.name} by position only")
            if parameter.default is parameter.empty:
                if parameter.kind is parameter.KEYWORD_ONLY:
                    raise TraceError(f"its forward takes {parameter.name} by keyword only")
                self.required.append(parameter.name)
                self.conditions.append(input_conditions.get(parameter.name, f"is_tensor({parameter.name})"))
            elif parameter.default is None or isinstance(parameter.default, (bool, int, float, str)):
                self.conditions.append(_equals(parameter.name, parameter.default))
            else:
                raise TraceError(f"the default of {parameter.name} is {parameter.default!r}")
        self._context: Any = None
        self._is_watching = True
        self._absent: list[tuple[nn.Module, str]] = []
        self._seen: dict[tuple[nn.Module, str], tuple[Any, Any]] = {}  # (now, as it was)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _TensorProxy else super().create_arg(a)  # and not a tensor constant

    def create_node(self, *arguments: Any, **keywords: Any) -> Node:
        if self._context is not None and _context() != self._context:
            raise TraceError("part of its forward runs under no_grad, autocast or hooks on saved tensors")
        return super().create_node(*arguments, **keywords)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self._is_watching = False  # this looks for the tensor everywhere
        try:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        finally:
            self._is_watching = True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        arguments = [
            self.create_proxy("placeholder", p.name, (), {}) if p.name in self.required else p.default
            for p in self.parameters
            if p.kind is not p.KEYWORD_ONLY
        ]

        def forward(*arguments: Any) -> Any:
            with self._watching():
                y = self.function(*arguments)
            self._finish_watching()
            return y

        forward.__annotations__ = {}
        return forward, [self.root, *arguments]

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        before = _random_states()
        self._context = _context()
        inherited = nn.Module.__getattribute__

        def watched(module: nn.Module, name: str) -> Any:
            if name == "_modules" and self._is_watching:  # a list or dict of modules is gone through
                self._seen.setdefault((module, name), (None, tuple(module.__dict__["_modules"])))
            if not self._is_watching or name in _NOT_WATCHED or name.startswith("__"):
                return inherited(module, name)
            if name == "training":  # of the two modes, the one that costs most; the condition sends away the other
                self._seen.setdefault((module, name), (True, True))
                return True
            try:
                value = inherited(module, name)
            except AttributeError:
                for kind in ("_modules", "_parameters", "_buffers"):
                    if module.__dict__.get(kind, {}).get(name, self) is None:
                        self._seen.setdefault((module, name), (None, None))
                if not any(name in module.__dict__.get(kind, {}) for kind in ("_modules", "_parameters", "_buffers")):
                    self._absent.append((module, name))
                raise
            if name in module.__dict__ or not _is_described(type(module), name):
                if not isinstance(value, (nn.Module, Tensor)):
                    self._seen.setdefault((module, name), (value, copy.copy(value)))
            return value

        def refused(module: nn.Module, name: str, value: Any = None) -> None:
            raise TraceError(f"its forward sets {name!r}")

        def no_function(*_: Any, **__: Any) -> None:
            raise TraceError("its forward calls an autograd.Function or a scripted function")

        def unknown(*_: Any) -> None:
            raise TraceError("its forward asks for grad or autocast mode")

        with (
            mock.patch.object(nn.Module, "__getattribute__", watched, create=True),
            mock.patch.object(nn.Module, "__setattr__", refused),
            mock.patch.object(nn.Module, "__delattr__", refused),
            # C++, which would take a proxy for a tensor; what every Function.apply calls, however it was got hold of
            mock.patch.object(torch._functorch.utils, "unwrap_dead_wrappers", no_function),
            mock.patch.object(torch.jit.ScriptFunction, "__call__", no_function),
            mock.patch.object(torch, "is_inference_mode_enabled", unknown),
            mock.patch.object(torch, "is_grad_enabled", unknown),
            mock.patch.object(torch, "is_autocast_enabled", unknown),
            _NothingConcrete(),
        ):
            yield
        if before != _random_states():
            random.setstate(before[0])
            raise TraceError("its forward draws random numbers of Python or numpy")

    def _finish_watching(self) -> None:
        paths = {module: name for name, module in self.root.named_modules()}
        changed = False
        for now, was in self._seen.values():
            if isinstance(now, (list, dict, set)) and now != was:
                changed = True
                now.clear()
                now.extend(was) if isinstance(now, list) else now.update(was)
        if changed:
            raise TraceError("its forward changes a list or dict of its own")
        for module, name in self._absent:
            if module in paths and (module, name) not in self._seen:
                target = _format_target("self", paths[module]) if paths[module] else "self"
                self.conditions.append(f"not hasattr({target}, {name!r})")
        for (module, name), (value, was) in self._seen.items():
            if module not in paths:
                raise TraceError(f"its forward reads {name!r} of a module that is not its child")
            target = _format_target("self", f"{paths[module]}.{name}".lstrip("."))
            if name == "_modules":
                self.conditions.append(f"tuple({target}) == {was!r}")
            elif _is_literal(value):
                self.conditions.append(_equals(target, value))
            elif (text := _import_of(value, alias := f"imported_{len(self.imports)}")) is not None:
                self.imports.append(text)
                self.conditions.append(f"{target} is {alias}")
            else:
                raise TraceError(f"its forward reads {name!r}, a {type(value).__name__}, which may change")


class _NothingConcrete(TorchFunctionMode):
    """Refuses to compute: the result, a random number say, would be the same for ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(t, Proxy) for t in types):
            raise TraceError(f"its forward calls {getattr(func, '__name__', func)} on no input")
        return func(*args, **kwargs or {})


def _context() -> tuple[Any, ...]:
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (
        _is_grad_enabled(), _is_inference_mode_enabled(), hooks,
        *((_is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )  # fmt: skip


def _random_states() -> tuple[Any, ...]:
    numpys = () if (numpy := sys.modules.get("numpy")) is None else numpy.random.get_state()
    return random.getstate(), [part.tobytes() if hasattr(part, "tobytes") else part for part in numpys]


def _is_described(kind: type, name: str) -> bool:
    """Whether the class has a method, a property or the like of that name."""
    found = inspect.getattr_static(kind, name, None)
    return callable(found) or hasattr(found, "__get__")


def _is_literal(value: Any) -> bool:
    if isinstance(value, float):
        return type(value) is float and math.isfinite(value)
    if type(value) in (tuple, list, set):
        return bool(value or type(value) is not set) and all(map(_is_literal, value))
    if type(value) is dict:
        return all(_is_literal(k) and _is_literal(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, str)


def _equals(expression: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"{expression} is {value}"
    return f"type({expression}) is {type(value).__name__} and {expression} == {value!r}"  # == of a tensor is a tensor


def _import_of(value: Any, alias: str) -> str | None:
    """The statement that imports a function or class under ``alias``; None if there is none."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not callable(value):
        return None
    return f"from {module} import {name} as {alias}" if getattr(sys.modules.get(module), name, None) is value else None


def _dense_layer(self: Any, input: Any) -> Any:
    """The forward of torchvision's ``_DenseLayer`` as its block calls it: with a list, and nothing recomputed."""
    if self.memory_efficient:
        raise TraceError("memory_efficient=True runs it again in the backward")
    x = input.tracer.create_proxy("call_function", torch.cat, (input, 1), {})  # torch.cat itself wants a list
    y = self.conv1(self.relu1(self.norm1(x)))
    y = self.conv2(self.relu2(self.norm2(y)))
    if self.drop_rate > 0:
        y = nn.functional.dropout(y, p=self.drop_rate, training=self.training)
    return y


# Forwards that cannot be traced with a tensor: what to trace instead, and what its inputs are
_KNOWN: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "torchvision.models.densenet._DenseLayer": (_dense_layer, {"input": "isinstance(input, list)"}),
}
