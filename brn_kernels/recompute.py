"""``recompute_activations``: the outputs of the layers are not kept for the backward, but computed again from x.

What follows a layer (a convolution, a pooling) saves the layer's output y for its backward. The layer's own backward
needs its input x anyway, and y is one pass over x: ``activation((x - pivot) * scale + shift)``. So y need not be kept.

How it works: inside the context every tensor that autograd saves goes through ``_Hooks.pack``. Each call of a layer has
registered its y there with a *recipe*: x as packed for the layer's own backward, and the coefficients that y was made
with. A saved tensor that lies in y's memory, and was not modified since, is replaced by the recipe; others are kept.

- y is known by its storage. A weak reference keeps the storage's address, not its memory, from being used again.
- The recipe lives as long as someone needs it: the layer's saved x, or a consumer's saved y. The table of registered
  outputs holds it weakly, so neither the table nor the layer's node keeps x alive longer than PyTorch would.
- PyTorch compares versions only of tensors that no hook has touched; so the hooks here compare them.
- Hooks that were active before (``save_on_cpu``, a checkpointed region) still get all that is kept, once each.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import backends
from .backends import reference

_HookPair = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class recompute_activations(contextlib.ContextDecorator):  # noqa: N801  (a function to its callers)
    """Keep less for the backward: ``with brn.recompute_activations(): loss = criterion(model(x), target)``.

    Inside, the output of a training layer or of ``batch_renorm``, activation included, is not kept for the backward of
    what uses it, but computed again there from the layer's input: one read and one write, bits equal to the forward's,
    no communication between processes. The backward may run inside or outside. Also a decorator.

    Kept as usual: the output of a call with a residual, and what is made of an output by other operations.

    Safe: an input x that was modified in place between forward and backward is a ``RuntimeError``, as PyTorch's own
    (so is any other saved tensor); an output that was modified in place before something saved it is kept as usual,
    and after that the backward sees the values that were saved. ``retain_graph``, second derivatives, activation
    checkpointing (inside such a region, or around it), autocast, processes and threads (each enters for itself) work.
    Hooks that were active before (``torch.autograd.graph.save_on_cpu``) get what is kept; hooks entered inside hide the
    layers from this context. No effect in evaluation, without gradients, and in compiled code. Under ``torch.func``'s
    ``grad`` PyTorch refuses saved-tensor hooks with an error.

    Not noticed, as in PyTorch: modifications through ``.data``.
    """

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return
        top = torch._C._autograd._top_saved_tensors_default_hooks(False)
        hooks = _owner(top) or _Hooks(top)
        torch._C._autograd._push_saved_tensors_default_hooks(hooks.pack, hooks.unpack)

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        torch._C._autograd._pop_saved_tensors_default_hooks()


def hooks_of_others() -> _HookPair | None:
    """The saved-tensor hooks in force, this module's left out."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    ours = _owner(top)
    return top if ours is None else ours.outer


class Call:
    """A call of a layer whose output is not to be kept: ``coefficients`` goes to its forward, then ``register``."""

    def __init__(
        self,
        hooks: _Hooks,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: str | None,
        kernels: ModuleType,
    ) -> None:
        self._hooks, self._x, self._activation = hooks, x, activation
        self.coefficients: Tensor | None = None
        if kernels is not reference and kernels.is_fused(x, None, mask, activation):
            # filled by the forward with what it computed y of
            self.coefficients = torch.empty(3, x.shape[1], dtype=reference.statistics_dtype(x), device=x.device)
            self._compute = functools.partial(_applied, kernels, self.coefficients, activation)
        else:  # copies, since an optimizer may step before the backward
            self._weight = None if weight is None else weight.detach().clone()
            self._bias = None if bias is None else bias.detach().clone()
            self._mask = None if mask is None else (mask, mask._version)

    def register(self, y: Tensor, saved: Tensor) -> None:
        """Say that y, which the forward is about to return, can be computed again. The next to be saved must be x."""
        if self.coefficients is None:
            self._compute = functools.partial(
                _written, saved, self._mask, self._weight, self._bias, self._activation
            )  # fmt: skip
        self._hooks.register(self._x, y, _Recipe(self._x, y, self._compute))


def begin(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    backend: str,
) -> Call | None:
    """A ``Call`` if one of these arguments is under way inside ``recompute_activations``; else None."""
    hooks = _owner(torch._C._autograd._top_saved_tensors_default_hooks(False))
    if hooks is None or residual is not None or x.numel() == 0 or type(x) not in (Tensor, torch.nn.Parameter):
        return None
    return Call(hooks, x, mask, weight, bias, activation, backends.resolve(backend, x.device.type))


class _Recipe:
    """How to compute an output again."""

    __slots__ = ("__weakref__", "_compute", "_made", "_shape", "_stride", "_x_stride", "x")

    def __init__(self, x: Tensor, y: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
        self.x: Any = None  # as packed, once the layer has saved it
        self._x_stride, self._shape, self._stride = x.stride(), y.shape, y.stride()
        self._compute = compute
        self._made: tuple[StorageWeakRef, Any] | None = None  # what was computed last, and on which stream

    def output(self) -> Tensor:
        """y, computed now, or the memory of the last time if someone still holds it."""
        x = _unpacked(self.x, "the input of Batch Renormalization, of which its output is to be computed again,")
        stream = None if x.device.type == "cpu" else torch.accelerator.current_stream(x.device)
        if self._made is not None and self._made[1] == stream:
            storage = torch.UntypedStorage._new_with_weak_ptr(self._made[0].cdata)
            if storage is not None:
                return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, 0, self._shape, self._stride)
        y = self._compute(_with_strides(x, self._x_stride))
        y = _with_strides(y, self._stride)
        self._made = StorageWeakRef(y.untyped_storage()), stream
        return y


class _Output(NamedTuple):
    """A registered output, by its storage."""

    recipe: weakref.ref[_Recipe]
    storage: StorageWeakRef
    dtype: torch.dtype
    version: int


class _Recomputed(NamedTuple):
    """In place of a saved tensor: a view of a recipe's output."""

    recipe: _Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any  # int


class _Input(NamedTuple):
    """In place of the x that a layer saved: it keeps the recipe alive as long as the layer needs x itself."""

    x: Any
    recipe: _Recipe


class _Kept(NamedTuple):
    """A saved tensor as it is. Detached, since it may be an output of the node that saves it: that is a cycle."""

    tensor: Tensor
    version: int


class _Handed(NamedTuple):
    """What the hooks that were active before made of a saved tensor."""

    packed: Any
    unpack: Callable[[Any], Tensor]


_outputs: dict[int, _Output] = {}  # by the address of the storage


class _Hooks:
    """The hooks of one context, in one thread (in a backward, in its threads too)."""

    def __init__(self, outer: _HookPair | None) -> None:
        self.outer = outer
        # Under others' hooks only outputs of the same context are replaced: a checkpointed region that runs again, in a
        # context of its own, then hands them the same tensors in the same order.
        self._outputs = _outputs if outer is None else {}
        self._next: tuple[Tensor, _Recipe] | None = None  # the layer's x, which is about to be saved

    def register(self, x: Tensor, y: Tensor, recipe: _Recipe) -> None:
        storage = y.untyped_storage()
        address, outputs = storage._cdata, self._outputs
        reference_to_recipe = weakref.ref(recipe, lambda gone: _forget(outputs, address, gone))
        outputs[address] = _Output(reference_to_recipe, StorageWeakRef(storage), y.dtype, y._version)
        self._next = x, recipe

    def pack(self, tensor: Tensor) -> Any:
        if self._next is not None:
            (x, recipe), self._next = self._next, None
            if tensor is x:
                recipe.x = self._packed(tensor)
                return _Input(recipe.x, recipe)
        return self._packed(tensor)

    def unpack(self, packed: Any) -> Tensor:
        return _unpacked(packed, "a saved tensor")

    def _packed(self, tensor: Tensor) -> Any:
        if self._outputs and type(tensor) is Tensor and tensor.layout is torch.strided:
            output = self._outputs.get(tensor.untyped_storage()._cdata)
            if output is not None and output.version == tensor._version and output.dtype == tensor.dtype:
                recipe = output.recipe()
                if recipe is not None and recipe.x is not None and not tensor.is_neg():
                    return _Recomputed(recipe, tensor.shape, tensor.stride(), tensor.storage_offset())
        if self.outer is not None:
            return _Handed(self.outer[0](tensor), self.outer[1])
        return _Kept(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version)


def _unpacked(packed: Any, what: str) -> Tensor:
    kind = type(packed)
    if kind is _Kept:
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{what} [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version "
                f"{version} instead."
            )
        return tensor
    if kind is _Recomputed:
        with torch.no_grad():
            return packed.recipe.output().as_strided(packed.shape, packed.stride, packed.offset)
    if kind is _Input:
        return _unpacked(packed.x, what)
    return packed.unpack(packed.packed)


def _owner(hooks: _HookPair | None) -> _Hooks | None:
    """The context whose hooks these are, if they are this module's."""
    owner = None if hooks is None else getattr(hooks[0], "__self__", None)
    return owner if type(owner) is _Hooks else None


def _forget(outputs: dict[int, _Output], address: int, gone: weakref.ref[_Recipe]) -> None:
    output = outputs.get(address)
    if output is not None and output.recipe is gone:
        del outputs[address]


def _applied(kernels: ModuleType, coefficients: Tensor, activation: str | None, x: Tensor) -> Tensor:
    return kernels.apply(x, coefficients, activation)


def _written(
    saved: Tensor,
    mask: tuple[Tensor, int] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    x: Tensor,
) -> Tensor:
    valid = None if mask is None else _unpacked(_Kept(*mask), "the mask of Batch Renormalization")
    y = torch.empty_like(x)
    reference.write(y, x, None, valid, weight, bias, saved, activation)
    return y


def _with_strides(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor, copied if its memory is in another order (others' hooks may give x back so) than it was."""
    if tensor.stride() == stride or any(s == 0 and n > 1 for s, n in zip(stride, tensor.shape, strict=True)):
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
