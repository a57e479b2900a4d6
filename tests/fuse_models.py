"""Models to fuse, and what it means that nothing but the speed changes."""

import copy

import torch
import torch.fx.experimental.optimization
from torch import nn

import brn_kernels as brn
from brn_kernels.modules import BatchRenorm

OPEN = brn.ClipSchedule.constant(3, 5)


class Block(nn.Module):
    """A residual block, whose activation serves twice."""

    def __init__(self, shortcut=None):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = shortcut
        self.scale = 1.0

    def forward(self, x, skip=False):
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        if skip:
            return y
        y += x * self.scale if self.scale != 1.0 else x
        return self.act(y)


def module_of(function, **layers):
    """Of a class of its own, as forwards are written."""
    kind = type("Written", (nn.Module,), {"forward": function})
    module = kind()
    for name, layer in layers.items():
        setattr(module, name, layer)
    return module


def norm(channels=4):
    return nn.BatchNorm2d(channels)


def images(batch=4, channels=4):
    return torch.randn(batch, channels, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5


def results(model, x=None, seed=0, call=None):
    """Output, gradients and statistics of a step, then the output in evaluation."""
    x = (images() if x is None else x).clone().requires_grad_()
    torch.manual_seed(seed)
    y = (call or model)(x)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    found = [y.detach().clone(), x.grad, *(g.clone() for g in grads), *(v.clone() for v in model.state_dict().values())]
    mode = model.training
    with torch.no_grad():
        found.append((call or model).eval()(x) if call is None else model.eval()(x))
    model.train(mode).zero_grad()
    return found


def assert_same(model, fused, **keywords):
    for ours, expected in zip(results(fused, **keywords), results(model, **keywords), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def calls(model, **keywords):
    """How many calls of norms did something more, in one forward: what was fused there and then."""
    count = 0
    forward = BatchRenorm.forward

    def counted(self, x, residual=None, mask=None, *, activation=None):
        nonlocal count
        count += residual is not None or activation is not None
        return forward(self, x, residual, mask, activation=activation)

    BatchRenorm.forward = counted
    plain = BatchRenorm.ends_with_normalization
    BatchRenorm.ends_with_normalization = lambda self: self.activation is None
    try:
        model(keywords.pop("x", images()), **keywords)
    finally:
        BatchRenorm.forward, BatchRenorm.ends_with_normalization = forward, plain
    return count


def pair(model, renorm=False):
    """The model in float64, as BatchNorm or with open limits, and a fused copy."""
    torch.manual_seed(0)
    model = copy.deepcopy(model).double()
    if renorm:
        brn.convert_batchnorm(model, schedule=OPEN, momentum=0.3)
    for layer in model.modules():
        if isinstance(layer, (BatchRenorm, nn.BatchNorm2d)) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model, brn.fuse(copy.deepcopy(model))


def check(model, counts, renorm=None, **keywords):
    """Fused and not, as BatchNorm and with open limits: the same results, and so many sites of each kind."""
    for each in (False, True) if renorm is None else (renorm,):
        plain, fused = pair(model, each)
        assert brn.fusion_report(fused).counts() == counts
        assert calls(copy.deepcopy(fused)) == sum(counts.values())
        assert_same(plain, fused, **keywords)
    return fused


SEQUENTIALS = {
    "relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True), "leaky_relu": nn.LeakyReLU(), "silu": nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish(),
}  # fmt: skip


def fused_block(**keywords):
    plain, fused = pair(Block(**keywords))
    assert calls(copy.deepcopy(fused)) == 2
    return plain, fused
