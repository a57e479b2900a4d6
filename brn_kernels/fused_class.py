"""The class of a module whose forward is fused: a subclass of its own class, made from source text.

Text, because a module must survive pickling: another process makes the class again.
"""

from __future__ import annotations

import copyreg
import linecache
import types
import warnings
from typing import Any

from torch import Tensor, nn

from .fused_call import is_tensor, is_transparent, run_sequence

SEQUENTIAL = ""  # the source of an nn.Sequential: it has nothing to bake in

_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was fused."""
    return vars(type(module)).get("_brn_original", type(module))


def restore_classes(model: nn.Module) -> None:
    """Give every fused module in ``model`` the class it had."""
    for module in model.modules():
        if "_brn_original" in vars(type(module)):
            module.__class__ = original_class(module)


def fused_class(original: type[nn.Module], source: str) -> type[nn.Module]:
    """The subclass of ``original`` whose forward is that of ``source``; the same one for the same arguments.

    Raises:
        ImportError: the source needs a function that cannot be imported by its name.
    """
    key = (original, source)
    if key in _classes:
        return _classes[key]
    name = f"Fused{original.__name__}"
    methods: dict[str, Any] = {}
    if source == SEQUENTIAL:
        methods["forward"] = _sequential_forward
    else:
        namespace = {
            "original_forward": original.forward, "is_tensor": is_tensor, "is_transparent": is_transparent,
        }  # fmt: skip
        filename = f"<brn_kernels {name} {len(_classes)}>"
        exec(compile(source, filename, "exec"), namespace)
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        forward = namespace["forward"]
        assert isinstance(forward, types.FunctionType) and isinstance(original.forward, types.FunctionType)
        forward.__defaults__ = original.forward.__defaults__
        forward.__kwdefaults__ = original.forward.__kwdefaults__
        methods = {"forward": forward, "_brn_ending": namespace.get("ending")}

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made = super(new, self).__reduce_ex__(protocol)
        if made[0] is copyreg.__newobj__ and made[1][0] is new:  # type: ignore[attr-defined]
            return (_rebuild, (original, source, *made[1][1:]), *made[2:])
        return made

    metaclass: Any = type(original)
    new = metaclass(
        name,
        (original,),
        {
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            "__reduce_ex__": reduce,
            "_brn_original": original,
            "_brn_source": source,
            **methods,
        },
    )
    _classes[key] = new
    return new


def _rebuild(original: type[nn.Module], source: str, *arguments: Any) -> nn.Module:
    """A module as pickle makes it, before its state is set."""
    try:
        made = fused_class(original, source)
    except Exception as error:  # of another version of what the source imports
        warnings.warn(f"{original.__name__} is loaded unfused: {error}", stacklevel=2)
        made = original
    return copyreg.__newobj__(made, *arguments)  # type: ignore[attr-defined]


def _sequential_forward(self: nn.Sequential, input: Tensor) -> Tensor:
    if not is_tensor(input):
        return nn.Sequential.forward(self, input)
    return run_sequence(self, input)
