"""Calls of the native backend, and what they are compared with."""

import torch
from tolerances import UNITS

from brn_kernels.backends import auto_limits, native, reference

SCHEDULE = [3.0, 5.0, 0.0, 0.0, 0.0]


class Case:
    """A call's inputs, and a copy of its state for each run. ``limits``: r_max and d_max, or "auto"."""

    def __init__(self, shape, dtype, channels_last=False, residual=False, activation=None, limits=(1.3, 0.4), seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        def laid_out(values):
            return values.to(dtype) if not channels_last else to_channels_last(values.to(dtype))

        per_channel = (1, -1) + (1,) * (len(shape) - 2)
        channels = shape[1]
        spread = 1 + normal(channels).abs().view(per_channel)
        self.x = laid_out(normal(*shape) * spread + normal(channels).view(per_channel))
        self.residual = laid_out(normal(*shape)) if residual else None
        self.dy = laid_out(normal(*shape))
        acc = reference.statistics_dtype(self.x)
        self.weight, self.bias = normal(channels).to(acc), normal(channels).to(acc)
        self.running_mean, self.running_var = 0.5 * normal(channels).to(acc), 1 + normal(channels).to(acc).abs()
        self.limits = None if limits == "auto" else torch.tensor(limits, dtype=torch.float32)
        self.auto_state = automatic(normal, channels).to(acc) if limits == "auto" else None
        self.activation = activation

    def run(self, backend=native, clipped=False, double=False, weight=None):
        """(y, saved, bits, dx, dweight, dbias, dresidual), and the state after it; that of automatic limits last."""
        convert = (lambda t: None if t is None else t.double()) if double else (lambda t: t)
        x, residual, dy = convert(self.x), convert(self.residual), convert(self.dy)
        weight, bias = convert(self.weight if weight is None else weight), convert(self.bias)
        state = [convert(self.running_mean).clone(), convert(self.running_var).clone(), torch.tensor(7)]
        state.append(torch.full((x.shape[1],), clipped))
        auto_state = None if self.auto_state is None else convert(self.auto_state).clone()
        y, saved, bits = backend.forward(
            x, residual, None, weight, bias, *state, self.limits, SCHEDULE, 0.1, 1e-5, self.activation,
            auto_state=auto_state,
        )  # fmt: skip
        gradients = backend.backward(dy, x, residual, None, weight, bias, saved, bits, self.activation, True, True)
        return (y, saved, bits, *gradients), state if auto_state is None else [*state, auto_state]


def automatic(normal, channels):
    """A state of automatic limits: of every fourth channel wide, just open, a batch too few for that, at the start."""
    state = normal(auto_limits.ROWS, channels)
    seen = torch.tensor([1000, auto_limits.MIN_BATCHES, auto_limits.MIN_BATCHES - 1, 0], dtype=state.dtype)
    noise = torch.tensor([9.0, 0.03, 0.03, 0.03], dtype=state.dtype)
    state[auto_limits.COUNT] = seen.repeat(channels)[:channels]
    state[auto_limits.NOISE_D :] = state[auto_limits.NOISE_D :].square() * noise.repeat(channels)[:channels]
    return state


def to_channels_last(values):
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def check(case):
    """Against the specification in float64; r and d decided by each for itself."""
    ours, state = case.run()
    truth, truths_state = case.run(reference, double=True)
    eps = torch.finfo(case.x.dtype).eps
    acc_eps = torch.finfo(reference.statistics_dtype(case.x)).eps
    largest = case.x.double().abs().max().item()
    gain = (case.weight.double().abs() * truth[1][1] * truth[1][2]).max().item()  # of dy to dx
    offset = largest * truth[1][1].max().item()  # what rounding errors of x grow by, normalized
    count = case.x.numel() / case.x.shape[1]
    dy = case.dy.double().abs().max().item()
    reduced = count * dy * (1 + offset) * (1 + truth[1][3].abs().max().item())
    scales = {
        "y": (UNITS * acc_eps * (gain * largest + 1) + eps * truth[0].abs().max().item()),
        "dx": UNITS * acc_eps * gain * dy * (1 + offset) * (1 + offset) + eps * truth[3].abs().max().item(),
        "dweight": UNITS * acc_eps * reduced,
        "dbias": UNITS * acc_eps * reduced,
        "dresidual": UNITS * acc_eps * dy + eps * dy,
    }
    kink = 0.0
    if case.activation in ("relu", "leaky_relu", "hardswish"):  # next to a kink the derivative may be either side's
        kink = 2e-4 if case.x.dtype == torch.float32 else 0.0 if case.x.dtype == torch.float64 else 1e-3
    for name, mine, true in zip(("y", None, None, "dx", "dweight", "dbias", "dresidual"), ours, truth, strict=True):
        if name is None:
            continue
        wrong = (mine.double() - true).abs() > scales[name]
        if kink and name in ("dx", "dresidual"):
            assert wrong.double().mean() <= kink, name
        elif not (kink and name in ("dweight", "dbias")):
            assert not wrong.any(), f"{name}: {(mine.double() - true).abs().max():.3g} over {scales[name]:.3g}"
    torch.testing.assert_close(state[0].double(), truths_state[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state[1].double(), truths_state[1], rtol=1e-5, atol=1e-6)
    assert state[2].item() == 8
    if case.auto_state is not None:
        torch.testing.assert_close(state[4].double(), truths_state[4], rtol=1e-4, atol=1e-5)
