"""Calls of the operators, in C++ and in Python, for the tests of both."""

from unittest import mock

import torch
from node_calls import laid_out

from brn_kernels import ops

SCHEDULES = {
    "open": [3.0, 5.0, 0.0, 0.0, 0.0],
    "ramps": [1.2, 0.3, 1.0, 40.0, 6.0],
    "closed": [1.0, 0.0, 0.0, 0.0, 0.0],
}
IN_PYTHON = {
    ops.forward: torch.ops.brn_kernels.forward_in_python, ops.backward: torch.ops.brn_kernels.backward_in_python
}  # fmt: skip
UPDATED = (*range(5, 9), 17, 18)  # of the forward's arguments


def forward_arguments(
    dtype=torch.float32, layouts=("contiguous", "contiguous"), residual=False, activation=None, affine=True,
    tracked=True, schedule="open", momentum=0.1, backend="native", shape=(4, 6, 5, 3), traced=False,
):  # fmt: skip
    """Of ``ops.forward``; ``schedule``: a name of ``SCHEDULES``, "tensor" or "auto"."""
    generator = torch.Generator().manual_seed(0)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x = laid_out((normal(*shape) * 2 + 1).to(dtype), layouts[0])
    extra = laid_out(normal(*shape).to(dtype), layouts[1]) if residual else None
    weight, bias = (normal(6).to(statistics), normal(6).to(statistics)) if affine else (None, None)
    kept = [None] * 4
    if tracked:
        mean, var = normal(6).to(statistics), normal(6).abs().to(statistics) + 0.5
        kept = [mean, var, torch.tensor(20), torch.zeros(6, dtype=torch.bool)]
    limits = torch.tensor([1.3, 0.2], dtype=statistics) if schedule == "tensor" else None
    state = torch.zeros(5, 6, dtype=statistics) if schedule == "auto" and tracked else None
    return [
        x, extra, None, weight, bias, *kept, limits, SCHEDULES.get(schedule, SCHEDULES["open"]), momentum, 1e-5,
        activation, backend, traced, None, None, state,
    ]  # fmt: skip


def backward_arguments(forward, dy_layout="contiguous", needs_dx=True, needs_dresidual=False):
    """Of ``ops.backward``, after ``ops.forward`` of those."""
    x, residual, activation = forward[0], forward[1], forward[13]
    y, saved, bits = IN_PYTHON[ops.forward](*copied(forward))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    dy = torch.empty_like(x).copy_(dy) if dy_layout == "as y" else laid_out(dy, dy_layout)
    return [dy, x, residual, None, *forward[3:5], saved, bits, activation, needs_dx, needs_dresidual, forward[14], None]


def copied(arguments):
    """With what is updated copied, memory and all."""
    found = list(arguments)
    for i in UPDATED if len(arguments) == 19 else ():
        if torch.is_tensor(arguments[i]):
            found[i] = arguments[i].clone()
    return found


def result(operator, arguments):
    """All that it returns and leaves behind, or its error."""
    arguments = copied(arguments)
    try:
        found = operator(*arguments)
    except Exception as error:  # noqa: BLE001  (any, to be compared)
        return type(error), str(error)
    updated = [arguments[i] for i in UPDATED] if len(arguments) == 19 else []
    return *found, *[t for t in updated if t is not None]


def alike(found, expected):
    assert len(found) == len(expected)
    for one, another in zip(found, expected, strict=True):
        if not torch.is_tensor(another):
            assert one == another
            continue
        assert one.dtype == another.dtype and one.stride() == another.stride() and one.shape == another.shape
        assert torch.equal(one.nan_to_num(), another.nan_to_num())


def without_python():
    """No implementation in Python may be called."""
    refuse = mock.Mock(side_effect=AssertionError("in Python"))
    return mock.patch.multiple(ops, forward_implementation=refuse, backward_implementation=refuse)
