"""``batch_renorm``: checks first, so that a bad call changes nothing; then autograd."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, distributed, node, observe, ops
from .autograd import BatchRenormFunction
from .backends import auto_limits, reference
from .checkpointing import pre_update_statistics
from .schedule import ClipSchedule, check_limits, is_number

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "hardswish")


def batch_renorm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-5,
    *,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Batch Renormalization (Ioffe 2017, algorithm 1), then ``+ residual``, then the activation.

    In training each channel is normalized by its batch statistics, corrected by r and d towards the running ones,
    which are then updated in place. In evaluation this is :func:`torch.nn.functional.batch_norm`.

    Args:
        x: (N, C, *spatial), half, bfloat16, float or double, in any memory format.
        running_mean: (C,), the mean of each channel; ``None`` (in training): batch statistics alone, as BatchNorm.
        running_var: (C,), the variance of each channel (not the paper's standard deviation).
        weight: (C,), gamma. Of x's dtype, or float32 for half and bfloat16 x; so are bias and the statistics.
        bias: (C,), beta.
        training: whether to normalize by batch statistics and update the running ones.
        momentum: weight of the batch in the running statistics (PyTorch's convention).
        eps: added to the variance, positive.
        r_max: limit of r, at least 1: ``r`` is clipped to [1/r_max, r_max]. A float or a 0-d tensor; a value that
            changes while the code is compiled should be a tensor.
        d_max: limit of abs(d), at least 0. A float or a 0-d tensor. The range of tensors is not checked: that would
            synchronize.
        residual: added before the activation; x's shape and dtype.
        mask: bool, (N, *spatial) or (N, 1, *spatial): True where a value counts. Others stay out of the statistics;
            their output is 0 and so is their gradient.
        activation: ``None``, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"hardswish"``.

    Returns:
        x's shape and dtype, and its memory format if x is dense.

    Raises:
        ValueError: an argument of the wrong rank, shape, dtype, device or range; nothing has been updated then.
    """
    limits, numbers = None, ClipSchedule.batchnorm().numbers
    check_limits(1.0 if isinstance(r_max, Tensor) else r_max, 0.0 if isinstance(d_max, Tensor) else d_max)
    if isinstance(r_max, Tensor) or isinstance(d_max, Tensor):
        limits = torch.stack([_limit_tensor("r_max", r_max, x), _limit_tensor("d_max", d_max, x)])
    else:
        numbers = (float(r_max), float(d_max), 0.0, 0.0, 0.0)
    if not is_number(momentum) or not math.isfinite(momentum):
        raise ValueError(f"momentum must be a finite number, got {momentum!r}")
    check_eps(eps)
    check_activation(activation)
    return renormalize(
        x, residual, mask, weight, bias, running_mean, running_var, None, None, limits, numbers, float(momentum),
        float(eps), activation, training,
    )  # fmt: skip


def renormalize(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    clipped: Tensor | None,
    limits: Tensor | None,
    schedule: tuple[float, ...],
    momentum: float | None,
    eps: float,
    activation: str | None,
    training: bool,
    process_group: str | None = None,
    auto_state: Tensor | None = None,
) -> Tensor:
    """What ``batch_renorm`` and the layers share: check the tensors, then normalize in the mode asked for."""
    backend, y = backends.selected(), None
    if training and mask is None and process_group is None and not torch.compiler.is_compiling() and node.module():
        call = (
            x, residual, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits, auto_state,
            schedule, momentum, eps, activation,
        )  # fmt: skip
        y = node.forward(backend, *call)
        if isinstance(y, Tensor):
            return y
    _check_tensors(x, residual, mask, weight, bias, running_mean, running_var, training, process_group)
    _check_devices(
        x, residual=residual, mask=mask, num_batches_tracked=num_batches_tracked, clipped=clipped, auto_state=auto_state
    )
    if auto_state is not None:
        _check_auto_state(x, auto_state)
    if mask is not None and mask.dim() < x.dim():
        mask = mask.unsqueeze(1)
    if not training:
        return _evaluate(x, residual, mask, weight, bias, running_mean, running_var, eps, activation)
    ordinary = process_group is None and _is_ordinary(x)
    traced = not ordinary and torch.compiler.is_compiling()
    if not ordinary:
        if running_mean is not None and running_var is not None and not traced:
            running_mean, running_var, num_batches_tracked, clipped, auto_state = pre_update_statistics(
                running_mean, running_var, num_batches_tracked, clipped, auto_state
            )
        if _is_transformed():
            if distributed.group_of(process_group) is not None:
                raise RuntimeError(
                    "function transforms (torch.func) with statistics of several processes are not implemented"
                )
            return _transformed(
                x, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits,
                schedule, momentum, eps, activation, auto_state,
            )  # fmt: skip
    elif y is NotImplemented and node.prepare(backend, *call):
        y = node.forward(backend, *call)
        if isinstance(y, Tensor):
            return y
    rest = (
        running_mean, running_var, num_batches_tracked, clipped, limits, schedule, momentum, eps, activation,
        backend, traced, process_group,
    )  # fmt: skip
    # Dynamo cannot trace a Function none of whose inputs wants a gradient
    if ordinary or (torch.is_grad_enabled() and _wants_gradient(x, residual, weight, bias)):
        return BatchRenormFunction.apply(x, residual, mask, weight, bias, (*rest, auto_state, ordinary))
    return ops.run_forward(x, residual, mask, weight, bias, *rest, None, auto_state)[0]


def _is_ordinary(x: Tensor) -> bool:
    """Whether it is an eager call with gradients that nothing else looks at, or will run again, as most are."""
    return (
        not ops.is_observed(x)
        and torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and torch._C._current_graph_task_id() == -1
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not observe.observers
    )


def _evaluate(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    assert running_mean is not None and running_var is not None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and _wants_gradient(x, residual, weight, bias):
        # its backward needs them as they are now: a training step may come first
        running_mean, running_var = running_mean.clone(), running_var.clone()
    if weight is not None and weight.dtype != running_mean.dtype:  # F.batch_norm wants one dtype for all of them
        weight = weight.to(running_mean.dtype)
    if bias is not None and bias.dtype != running_mean.dtype:
        bias = bias.to(running_mean.dtype)
    if mask is not None:  # what is masked may hold anything: keep it out of the gradients too
        x = torch.where(mask, x, 0)
        residual = None if residual is None else torch.where(mask, residual, 0)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    if residual is not None:
        y = y + residual
    y = reference.activate(y, activation)
    return y if mask is None else torch.where(mask, y, 0)


def _transformed(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    clipped: Tensor | None,
    limits: Tensor | None,
    schedule: tuple[float, ...],
    momentum: float | None,
    eps: float,
    activation: str | None,
    auto_state: Tensor | None,
) -> Tensor:
    """Training under a transform: plain PyTorch, which every transform knows, whatever the backend."""
    try:
        _, saved, _ = reference.forward(
            x.detach(), None, mask, None, None, running_mean, running_var, num_batches_tracked, clipped, limits,
            list(schedule), momentum, eps, None, auto_state,
        )  # fmt: skip
    except RuntimeError as error:
        if running_mean is None:
            raise
        raise RuntimeError(
            "Batch Renormalization updates its running statistics in place, which a function transform allows only for "
            "its own arguments: pass the buffers to the transformed function and on to torch.func.functional_call "
            "(for vmap stacked, by torch.func.stack_module_state), or call the layer in evaluation mode"
        ) from error
    return reference.composed(x, residual, mask, weight, bias, saved.detach(), eps, activation)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _is_transformed() -> bool:
    """Whether a function transform (``torch.func``) or forward-mode differentiation is under way."""
    # by its type, since Dynamo takes even no interpreter for something that is not None
    if isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter):
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def check_eps(eps: float) -> None:
    """Raise ``ValueError`` unless eps is a positive, finite number."""
    if not (is_number(eps) and 0 < eps < math.inf):
        raise ValueError(f"eps must be a positive, finite number, got {eps!r}")


def check_activation(activation: str | None) -> None:
    """Raise ``ValueError`` unless it is one of the fused activations."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}")


def _limit_tensor(name: str, limit: float | Tensor, x: Tensor) -> Tensor:
    dtype = reference.statistics_dtype(x)
    if not isinstance(limit, Tensor):
        return torch.full((), limit, dtype=dtype, device=x.device)
    if limit.dim() != 0:
        raise ValueError(f"{name} must be a float or a 0-d tensor, got a tensor of shape {tuple(limit.shape)}")
    if limit.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} as x, got one on {limit.device}")
    return limit.detach().to(dtype)


def _check_tensors(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    process_group: str | None,
) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() < 2 and x.shape != (0,):  # F.batch_norm takes an empty vector too
        raise ValueError(f"x: expected 2 or more dimensions (N, C, ...), got {x.dim()} (shape {tuple(x.shape)})")
    channels = x.shape[1] if x.dim() > 1 else 0
    shape, dtype, device = (channels,), x.dtype, x.device
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    for t in (weight, bias, running_mean, running_var):
        if t is not None and (t.shape != shape or (t.dtype != dtype and t.dtype != wide) or t.device != device):
            _refuse_vectors(x, wide, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if running_mean is None or running_var is None:
        if running_mean is not None or running_var is not None:
            raise ValueError("running_mean and running_var: expected both or neither")
        if not training:
            raise ValueError("running_mean and running_var: expected tensors in evaluation mode, got None")
    elif running_mean.dtype != running_var.dtype:
        raise ValueError(f"running_var: expected running_mean's dtype {running_mean.dtype}, got {running_var.dtype}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        if residual.dtype != dtype:
            raise ValueError(f"residual: expected x's dtype {dtype}, got {residual.dtype}")
    if mask is not None:
        without_channels = (x.shape[0], *x.shape[2:])
        if tuple(mask.shape) not in (without_channels, (x.shape[0], 1, *x.shape[2:])):
            raise ValueError(
                f"mask: expected shape {without_channels} or {(x.shape[0], 1, *x.shape[2:])}"
                f" for x of shape {tuple(x.shape)}, got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
    if training and x.numel() == channels and channels > 0 and process_group is None:  # others may have more
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def _refuse_vectors(x: Tensor, wide: torch.dtype, **vectors: Tensor | None) -> None:
    """Say what is wrong with one of them."""
    channels = x.shape[1] if x.dim() > 1 else 0
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (channels,):
            raise ValueError(
                f"{name}: expected shape ({channels},) for x of shape {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
        if vector.dtype not in (x.dtype, wide):
            expected = str(x.dtype) if wide == x.dtype else f"{x.dtype} or {wide}"
            raise ValueError(f"{name}: expected {expected} for x of {x.dtype}, got {vector.dtype}")
    _check_devices(x, **vectors)


def _check_auto_state(x: Tensor, auto_state: Tensor) -> None:
    channels = x.shape[1] if x.dim() > 1 else 0
    if auto_state.shape != (auto_limits.ROWS, channels):
        raise ValueError(
            f"auto_state: expected shape {(auto_limits.ROWS, channels)} for x of shape {tuple(x.shape)}, "
            f"got {tuple(auto_state.shape)}"
        )
    if auto_state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"auto_state: expected torch.float32 or torch.float64, got {auto_state.dtype}")


def _check_devices(x: Tensor, **tensors: Tensor | None) -> None:
    device = x.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {x.device} as x, got one on {tensor.device}")
