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
    ``node.py`` does the same faster, for such calls alone, where it has been built.
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
        ctx.gated_by_y, call = traced and reference.keeps_bits(residual, ctx.activation), None
        if ordinary:
            kernels = backends.resolve(ctx.backend, x.device.type)
            y, saved, bits = kernels.forward(x, residual, mask, weight, bias, *rest[:9], auto_state=auto_state)
        else:
            if not traced:
                call = recompute.begin(x, residual, mask, weight, bias, ctx.activation, ctx.backend)
            coefficients = None if call is None else call.coefficients
            y, saved, bits = ops.run_forward(
                x, residual, mask, weight, bias, *rest[:-2], coefficients, auto_state
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.channels_last = layout.layout_of(x).channels_last if bits is not None else None
        if call is not None:
            ctx.output = call.register(y, saved)
        # y <= 0: where the gradient stops. Compilers keep y itself instead, where the next layer keeps it anyway.
        gate = y <= 0 if ctx.gated_by_y else bits
        ctx.save_for_backward(x, reference.read_again(residual, ctx.activation), mask, weight, bias, saved, gate)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        if dy is None:
            if ctx.process_group is None:
                return (None,) * 6
            dy = torch.zeros_like(ctx.saved_tensors[0])  # other processes wait for this one's sums
        x, residual, mask, weight, bias, saved, gate = ctx.saved_tensors
        activation = ctx.activation
        if ctx.gated_by_y:  # a compiler does that together with what comes before; it is dresidual, too
            dy, activation, gate = dy.masked_fill(gate, 0), None, None
        needs_dx, needs_dresidual, _, needs_dweight, needs_dbias = ctx.needs_input_grad[:5]
        dx, dresidual, dweight, dbias = gradients(
            dy, (x, residual, weight, bias, saved, gate), (needs_dx, needs_dresidual, needs_dweight, needs_dbias),
            ctx.eps, activation, ctx.backend, ctx.channels_last, mask, ctx.process_group,
        )  # fmt: skip
        return dx, dresidual, None, dweight, dbias, None


def gradients(
    dy: Tensor,
    kept: tuple[Tensor | None, ...],
    needs: tuple[bool, bool, bool, bool],
    eps: float,
    activation: str | None,
    backend: str,
    channels_last: bool | None,
    mask: Tensor | None = None,
    process_group: str | None = None,
) -> tuple[Tensor | None, ...]:
    """Those of x, residual, weight and bias, as far as ``needs`` says.

    Args:
        dy: the gradient of y.
        kept: x, residual (None if the backward does without it), weight, bias, and the forward's saved and bits.
        needs: which gradients.
        eps: of the call.
        activation: of the call.
        backend: the name in force at the forward.
        channels_last: the order of the bits, which x had then; None if there are none.
        mask: of the call.
        process_group: of the call.
    """
    x, residual, weight, bias, saved, bits = kept
    assert x is not None and saved is not None
    if channels_last is not None:
        x = layout.kept_in(x, channels_last)
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = needs
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if distributed.group_of(process_group) is not None:
            raise RuntimeError("second derivatives through statistics of several processes are not implemented")
        return _differentiable(dy, x, residual, mask, weight, bias, saved, bits, needs, eps, activation)

    dresidual_is_dy = needs_dresidual and activation is None and mask is None
    dx, dweight, dbias, dresidual = ops.run_backward(
        dy, x, residual, mask, weight, bias, saved, bits, activation,
        needs_dx, needs_dresidual and not dresidual_is_dy, backend, process_group,
    )  # fmt: skip
    return (
        dx,
        dy if dresidual_is_dy else dresidual,
        _cast(dweight, weight) if needs_dweight else None,
        _cast(dbias, bias) if needs_dbias else None,
    )


def _cast(gradient: Tensor, parameter: Tensor | None) -> Tensor:
    assert parameter is not None  # its gradient is asked for
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)  # asking is the quicker


def _differentiable(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    bits: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    eps: float,
    activation: str | None,
) -> tuple[Tensor | None, ...]:
    """The gradients under ``create_graph=True``: made of differentiable operations."""
    if bits is not None:
        dy, activation = torch.where(layout.unpack_bits(bits, x), dy, 0), None
    # aliases, so that a tensor given twice (as x and as residual) gets each gradient apart
    aliases = [None if t is None else t.view_as(t) for t in (x, residual, weight, bias)]
    of_x, of_residual, of_weight, of_bias = aliases
    assert of_x is not None
    y = reference.composed(of_x, of_residual, mask, of_weight, of_bias, saved, eps, activation)
    wanted = {i: t for i, t in enumerate(aliases) if t is not None and needs[i]}
    gradients: list[Tensor | None] = [None] * 4
    found = torch.autograd.grad(y, list(wanted.values()), dy, create_graph=True, allow_unused=True)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    if needs[1] and residual is None:  # not saved, since its gradient is dy'
        gradients[1] = dy if mask is None else torch.where(mask, dy, 0)
    return tuple(gradients)
