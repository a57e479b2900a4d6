"""The autograd Function around the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, distributed, ops, recompute
from .backends import layout, reference


class BatchRenormFunction(torch.autograd.Function):
    """Training-mode Batch Renormalization; gradients for x, residual, weight and bias, with r and d constant.

    ``rest`` are the arguments of ``ops.forward`` after the differentiable ones, without ``coefficients``, and whether
    the call is an ordinary one: its own process's, and seen by nobody but autograd. Then its backend is called at once.
    """

    # Not split into forward and setup_context: PyTorch then inspects the signature at every call, which takes longer
    # than all else that the host does here.
    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        ctx.eps, ctx.activation, ctx.backend, traced, ctx.process_group, auto_state, ordinary = rest[7:]
        call = None
        if ordinary:
            kernels = backends.resolve(ctx.backend, x.device.type)
            y, saved, bits = kernels.forward(x, residual, mask, weight, bias, *rest[:9], auto_state=auto_state)
        else:
            if not traced:
                auto = auto_state is not None and distributed.group_of(ctx.process_group) is None
                call = recompute.begin(x, residual, mask, weight, bias, ctx.activation, ctx.backend, auto)
            coefficients = None if call is None else call.coefficients
            y, saved, bits = ops.run_forward(
                x, residual, mask, weight, bias, *rest[:-2], coefficients, auto_state
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        if ctx.activation is None or reference.keeps_bits(residual, ctx.activation):
            residual = None  # the backward does without it
        ctx.channels_last = layout.layout_of(x).channels_last if bits is not None else None
        if call is not None:
            ctx.output = call.register(y, saved)
        ctx.save_for_backward(x, residual, mask, weight, bias, saved, bits)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        if dy is None:
            if ctx.process_group is None:
                return (None,) * 6
            dy = torch.zeros_like(ctx.saved_tensors[0])  # other processes wait for this one's sums
        x, residual, mask, weight, bias, saved, bits = ctx.saved_tensors
        if ctx.channels_last is not None:  # the bits are in the order that x had
            x = layout.kept_in(x, ctx.channels_last)
        needs_dx, needs_dresidual, _, needs_dweight, needs_dbias = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if distributed.group_of(ctx.process_group) is not None:
                raise RuntimeError("second derivatives through statistics of several processes are not implemented")
            return _differentiable_backward(ctx, dy, x, residual, mask, weight, bias, saved, bits)

        dresidual_is_dy = needs_dresidual and ctx.activation is None and mask is None
        dx, dweight, dbias, dresidual = ops.run_backward(
            dy, x, residual, mask, weight, bias, saved, bits, ctx.activation,
            needs_dx, needs_dresidual and not dresidual_is_dy, ctx.backend, ctx.process_group,
        )  # fmt: skip
        return (
            dx,
            dy if dresidual_is_dy else dresidual,
            None,
            _cast(dweight, weight) if needs_dweight else None,
            _cast(dbias, bias) if needs_dbias else None,
            None,
        )


def _cast(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)  # asking is the quicker


def _differentiable_backward(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    bits: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The backward under ``create_graph=True``: itself made of differentiable operations."""
    activation = ctx.activation
    if bits is not None:
        dy, activation = torch.where(layout.unpack_bits(bits, x), dy, 0), None
    inputs = [x, residual, mask, weight, bias]
    # aliases, so that a tensor given twice (as x and as residual) gets each gradient apart
    aliases = [None if t is None else t.view_as(t) for t in inputs]
    y = reference.composed(*aliases, saved, ctx.eps, activation)  # type: ignore[arg-type, call-arg]
    wanted = {i: t for i, t in enumerate(aliases) if t is not None and ctx.needs_input_grad[i]}
    gradients: list[Tensor | None] = [None] * 6
    found = torch.autograd.grad(y, list(wanted.values()), dy, create_graph=True, allow_unused=True)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    if ctx.needs_input_grad[1] and residual is None:  # not saved, since its gradient is dy'
        gradients[1] = dy if mask is None else torch.where(mask, dy, 0)
    return tuple(gradients)
