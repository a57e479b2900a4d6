"""Run a model and leave it exactly as it was: for measurements in training mode."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model and the random number generators are as before afterwards.

    Kept: values of parameters, buffers and gradients, which tensors they are, training flags, hooks, submodules and
    all other attributes of every module that are set by assignment; generators of torch (CPU and CUDA), Python and
    NumPy. Costs a copy of all parameters, gradients and buffers. What is compiled runs eagerly inside, so that hooks
    are called.

    Raises:
        ValueError: a lazy module has no shape yet: its first batch would change it for good.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run a batch through the model first")
    attributes = [_Attributes(module) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else []))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy_random = sys.modules["numpy"].random
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        try:
            _swap_buffers(model)
            yield
        finally:
            for saved in attributes:
                saved.restore()
            with torch.no_grad():
                for tensor, value in values:
                    _set(tensor, value)
                for parameter, gradient, kept in gradients:
                    if gradient is not None and kept is not None:
                        _set(gradient, kept)
                    if parameter.grad is not gradient:
                        parameter.grad = gradient


def _swap_buffers(model: nn.Module) -> None:
    """Run on copies: writing into a running statistic would invalidate a graph that holds it for its backward."""
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())


class _Attributes:
    """What a module's ``__dict__`` held, and what the dictionaries in it held (buffers, hooks, submodules)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held = dict(vars(module))
        self.contents = {name: dict(value) for name, value in self.held.items() if isinstance(value, dict)}

    def restore(self) -> None:
        for name, content in self.contents.items():
            _refill(self.held[name], content)
        _refill(vars(self.module), self.held)


def _refill(target: dict[str, Any], content: dict[str, Any]) -> None:
    same = list(target) == list(content) and all(target[name] is value for name, value in content.items())
    if not same:
        target.clear()
        target.update(content)


def _set(tensor: Tensor, value: Tensor) -> None:
    """Only if a bit changed: writing would invalidate a graph that holds the tensor for its backward."""
    if not _same_bits(tensor.detach(), value):
        tensor.copy_(value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided or a.is_quantized or a.numel() == 0:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
