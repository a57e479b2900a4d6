"""What every family of a model zoo must do: train a step, limits open, then predict the same after a revert."""

import functools

import torch
from torch import nn

import brn_kernels as brn

OPEN = brn.ClipSchedule.constant(2, 1)
OPEN_NORM_LAYER = functools.partial(brn.BatchRenorm2d, schedule=OPEN)


def check_training_and_reverting(model, count=None):
    """``model`` has no BatchNorm left and ``count`` layers of ours, if given; each of them is to be trained."""
    model.double()  # ConvNeXt's gradients start 1e-6 small: float32 weights of one would not move
    layers = [m for m in model.modules() if isinstance(m, brn.BatchRenorm)]
    assert layers and (count is None or len(layers) == count)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    before = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    for layer in layers:  # timm starts some at zero, which keeps gradients from what lies before
        nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    y = model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    y.backward(torch.randn_like(y))
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    optimizer.step()
    for layer, (mean, var) in zip(layers, before, strict=True):
        assert layer.num_batches_tracked == 1 and not torch.equal(layer.weight, torch.ones_like(layer.weight))
        assert not torch.equal(layer.running_mean, mean) and not torch.equal(layer.running_var, var)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model.eval()(x)
    assert expected.isfinite().all() and expected.std() > 0
    reverted = brn.revert_to_batchnorm(model)
    assert not any(isinstance(m, brn.BatchRenorm) for m in reverted.modules())
    assert torch.equal(reverted(x), expected)
