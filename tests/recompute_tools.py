"""What the tests of ``recompute_activations`` share."""

import copy
import gc

import torch
from torch import nn

import brn_kernels as brn
from bench.saved_bytes import SavedBytes
from brn_kernels import recompute

LAYERS = {2: brn.BatchRenorm1d, 3: brn.BatchRenorm1d, 4: brn.BatchRenorm2d, 5: brn.BatchRenorm3d}


SCHEDULES = {
    "unclipped": brn.ClipSchedule.unclipped(),
    "some clipped": brn.ClipSchedule.constant(1.5, 0.5),
    "all clipped": brn.ClipSchedule.constant(1.0001, 0.0001),
    "closed": brn.ClipSchedule.batchnorm(),
}


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(x):
    return torch.stack([x, x], -1)[..., 0]


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last, "strided": every_other}


class Keep(torch.autograd.Function):
    """Passes x on and saves it; its backward says what it got back."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.save_for_backward(x)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.seen.append(ctx.saved_tensors[0])
        return dy, None


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        return Keep.apply(x, self.seen)


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def bits_of(x):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(kind)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
    assert torch.equal(bits_of(actual), bits_of(expected))


def interpreted(backend, device):
    return backend == "triton" and device.type == "cpu"


def is_freed(storage):
    """At once; Triton's interpreter leaves cycles behind."""
    if brn.backends.selected() == "triton" and not torch.cuda.is_available():
        gc.collect()
    return storage.expired()


def comes_back(layer, x, mask=None):
    """The layer's output and what its consumer gets of it in the backward; nothing of it may be kept in between."""
    seen = []
    with SavedBytes() as kept, brn.recompute_activations():
        y = layer(x) if mask is None else layer(x, mask=mask)
        expected = y.detach().clone(memory_format=torch.preserve_format)
        storage = recompute.StorageWeakRef(y.untyped_storage())
        loss = Keep.apply(y, seen).float().square().sum()
        del y
    assert is_freed(storage) and kept.bytes > 0
    loss.backward()
    return expected, seen[0]


def trained_layer(dims, channels, device, dtype=torch.float32, clipped="some clipped", **arguments):
    layer = LAYERS[dims](channels, schedule=SCHEDULES[clipped], device=device, **{"momentum": 0.1, **arguments})
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.copy_(1 + 0.3 * normal(channels, seed=1))
        if layer.bias is not None:
            layer.bias.copy_(normal(channels, seed=2))
    return layer.double() if dtype == torch.float64 else layer


def spread(x):
    """Channels of different means and variances, so that some clip and some do not."""
    view = [1, -1] + [1] * (x.dim() - 2)
    ramp = torch.linspace(0, 1, x.shape[1], dtype=torch.float64, device=x.device).view(view)
    return (x * (1 + ramp) + ramp).to(x.dtype)


class Net(nn.Module):
    """A convolution behind every kind of output: of a layer, with a residual, evaluated, viewed, sliced, joined."""

    def __init__(self, channels=6, activation="silu"):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(5)])
        self.norms = nn.ModuleList(
            [brn.BatchRenorm2d(channels, activation=activation, schedule=SCHEDULES["some clipped"]) for _ in range(5)]
        )
        self.norms[3].eval()
        self.join = nn.Conv2d(2 * channels, channels, 1)
        self.head = nn.Linear(channels * 4, 3)

    def forward(self, x):
        h1 = self.norms[0](self.convs[0](x))
        h2 = self.norms[1](self.norms[2](self.convs[1](h1)))  # one layer's output is the next one's input
        h3 = self.norms[3](self.convs[2](h2), residual=h1)
        h4 = self.norms[4](self.convs[3](h3), residual=h3)
        h5 = self.convs[4](h4[:, :, ::2, 1:]).mean((2, 3)).sum() + (h2 * h2.transpose(2, 3)).mean()
        h6 = self.join(torch.cat([h1, nn.functional.interpolate(h4, scale_factor=1.0) * 2], 1))
        return self.head(nn.functional.adaptive_max_pool2d(h6, 2).flatten(1)).square().mean() + h5


def run(model, x, *, on, steps=2, backward_inside=False, layout=torch.contiguous_format):
    model, x = copy.deepcopy(model), x.clone(memory_format=layout).requires_grad_()
    for _ in range(steps):
        if on and not backward_inside:
            with brn.recompute_activations():
                loss = model(x)
            loss.backward()
        elif on:
            with brn.recompute_activations():
                model(x).backward()
        else:
            model(x).backward()
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


class Total(nn.Module):
    def forward(self, x):
        return x.square().sum()
