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
- Hooks that were active before (``save_on_cpu``) still get all that is kept, once each.
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
from torch.utils import checkpoint

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
    checkpointing (around such a region; inside one there is nothing to spare), autocast, processes and threads (each
    enters for itself) work. Hooks that were active before (``torch.autograd.graph.save_on_cpu``) get what is kept, and
    may be asked for it more than once; hooks entered inside hide the layers from this context. No effect in
    evaluation, without gradients, and in compiled code. Under ``torch.func.grad`` and its relatives PyTorch refuses
    saved-tensor hooks with an error.

    Not noticed, as in PyTorch: modifications through ``.data``.
    """

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return
        top = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if top is None or not (_owner(top) or getattr(top[0], "__module__", None) == checkpoint.__name__):
            hooks = _Hooks(top)
            top = hooks.pack, hooks.unpack
        # else once more those in force: ours, or a checkpointed region's, which keeps nothing that could be spared, and
        # gives each tensor back but once
        torch._C._autograd._push_saved_tensors_default_hooks(*top)

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

    def register(self, y: Tensor, saved: Tensor) -> Output:
        """Say that y, which the forward is about to return, can be computed again. The next to be saved must be x."""
        if self.coefficients is None:
            self._compute = functools.partial(
                _written, saved, self._mask, self._weight, self._bias, self._activation
            )  # fmt: skip
        return self._hooks.register_layer(self._x, y, self._compute)


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
    """How to compute a tensor again."""

    __slots__ = ("__weakref__", "_device", "_made", "_stride", "dtype", "shape")

    def __init__(self, like: Tensor) -> None:
        self.shape, self._stride, self.dtype, self._device = like.shape, like.stride(), like.dtype, like.device
        self._made: tuple[StorageWeakRef, Any] | None = None  # what was computed last, and on which stream

    def output(self) -> Tensor:
        """The tensor, computed now, or in the memory of the last time if someone still holds that."""
        stream = None if self._device.type == "cpu" else torch.accelerator.current_stream(self._device)
        if self._made is not None and self._made[1] == stream:
            storage = torch.UntypedStorage._new_with_weak_ptr(self._made[0].cdata)
            if storage is not None:
                empty = torch.empty(0, dtype=self.dtype, device=self._device)
                return empty.set_(storage, 0, self.shape, self._stride)
        made = _with_strides(self._computed(), self._stride)
        self._made = StorageWeakRef(made.untyped_storage()), stream
        return made

    def _computed(self) -> Tensor:
        raise NotImplementedError


class _LayerRecipe(_Recipe):
    """The output of a layer, from its input."""

    __slots__ = ("_compute", "_x_stride", "x")

    def __init__(self, x: Tensor, y: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__(y)
        self.x: Any = None  # as packed, once the layer has saved it
        self._x_stride, self._compute = x.stride(), compute

    def _computed(self) -> Tensor:
        x = _unpacked(self.x, "the input of Batch Renormalization, of which its output is to be computed again,")
        return self._compute(_with_strides(x, self._x_stride))


class _CatRecipe(_Recipe):
    """What ``torch.cat`` made of outputs of layers, which are computed again, and of others, which are kept."""

    __slots__ = ("_dim", "_parts")

    def __init__(self, joined: Tensor, dim: int, parts: list[_Recipe | Any]) -> None:
        super().__init__(joined)
        self._dim, self._parts = dim, parts

    def _computed(self) -> Tensor:
        joined = torch.empty_strided(self.shape, self._stride, dtype=self.dtype, device=self._device)
        start = 0
        for part in self._parts:
            tensor = part.output() if isinstance(part, _Recipe) else _unpacked(part, "a part of a saved tensor")
            size = tensor.shape[self._dim]
            joined.narrow(self._dim, start, size).copy_(tensor)
            start += size
        return joined


class Output(NamedTuple):
    """A tensor that can be computed again."""

    recipe: weakref.ref[_Recipe]
    storage: StorageWeakRef  # so that its address is not used again
    version: int
    versions: Tensor  # with the version counter of the tensor, not its memory

    def alive(self) -> _Recipe | None:
        """The recipe, if someone still holds it and nobody has modified the tensor."""
        return self.recipe() if self.versions._version == self.version else None


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


class _Handed(NamedTuple):
    """What the hooks that were active before made of a saved tensor."""

    packed: Any
    unpack: Callable[[Any], Tensor]


_outputs: dict[int, Output] = {}  # by the address of the storage


class _Hooks:
    """The hooks of one context, in one thread (in a backward, in its threads too)."""

    def __init__(self, outer: _HookPair | None) -> None:
        self.outer = outer
        self._next: tuple[Tensor, _LayerRecipe] | None = None  # the layer's x, which is about to be saved

    def register_layer(self, x: Tensor, y: Tensor, compute: Callable[[Tensor], Tensor]) -> Output:
        recipe = _LayerRecipe(x, y, compute)
        self._next = x, recipe
        return self._register(y, recipe)

    def _register(self, tensor: Tensor, recipe: _Recipe) -> Output:
        storage = tensor.untyped_storage()
        address = storage._cdata
        versions = tensor.detach()
        versions.data = _nothing(tensor.dtype, tensor.device)
        held_by_others = weakref.ref(recipe, functools.partial(_forget, address))
        output = Output(held_by_others, StorageWeakRef(storage), tensor._version, versions)
        _outputs[address] = output
        return output

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
        if _outputs and type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_neg():
            output = _outputs.get(tensor.untyped_storage()._cdata)
            recipe = None
            if output is not None:
                recipe = output.alive() if tensor._version == output.version else None
            elif not tensor.is_leaf and type(tensor.grad_fn).__name__ == "CatBackward0":
                recipe = self._joined(tensor)
            if recipe is not None and tensor.dtype == recipe.dtype:
                return _Recomputed(recipe, tensor.shape, tensor.stride(), tensor.storage_offset())
        return self._kept(tensor)

    def _kept(self, tensor: Tensor) -> Any:
        if self.outer is not None:
            return _Handed(self.outer[0](tensor), self.outer[1])
        # detached, since it may be an output of the node that saves it, which would be a cycle
        return tensor if tensor.is_leaf else tensor.detach(), tensor._version

    def _joined(self, tensor: Tensor) -> _Recipe | None:
        """A recipe of what ``torch.cat`` returned, if at least a half of it is outputs of layers."""
        node: Any = tensor.grad_fn
        if tensor._version != 0 or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            return None
        dim = node._saved_dim
        dim = (dim - 2**64 if dim >= 2**63 else dim) % tensor.dim()
        known: list[tuple[int, _Recipe | None]] = []  # size along dim, and how to compute it
        for function, number in node.next_functions:
            if function is None:
                return None  # its size is not known
            shape = function._input_metadata[number].shape
            output = getattr(function, "output", None)
            recipe = output.alive() if isinstance(output, Output) else None
            if recipe is not None and recipe.dtype != tensor.dtype:
                recipe = None
            if len(shape) != tensor.dim():
                return None
            known.append((shape[dim], recipe))
        total = tensor.shape[dim]
        if 2 * sum(size for size, recipe in known if recipe is not None) < total:
            return None
        parts: list[_Recipe | Any] = []
        start = 0
        for size, recipe in known:
            parts.append(self._kept(tensor.narrow(dim, start, size).clone()) if recipe is None else recipe)
            start += size
        made = _CatRecipe(tensor, dim, parts)
        self._register(tensor, made)
        return made


def _unpacked(packed: Any, what: str) -> Tensor:
    kind = type(packed)
    if kind is tuple:  # a plain one is quickest to make
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


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=dtype, device=device)


def _forget(address: int, gone: weakref.ref[_Recipe]) -> None:
    output = _outputs.get(address)
    if output is not None and output.recipe is gone:
        del _outputs[address]


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
    valid = None if mask is None else _unpacked(mask, "the mask of Batch Renormalization")
    y = torch.empty_like(x)
    reference.write(y, x, None, valid, weight, bias, saved, activation)
    return y


def _with_strides(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor, copied if its memory is in another order (others' hooks may give x back so) than it was."""
    if tensor.stride() == stride or any(s == 0 and n > 1 for s, n in zip(stride, tensor.shape, strict=True)):
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
