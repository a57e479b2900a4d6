"""Whole torchvision models: converted, trained a step, reverted."""

import copy
import functools

import pytest
import torch
import torch.fx.experimental.optimization
from tolerances import assert_gradients_close
from torch import nn

import brn_kernels as brn

MODELS = ["resnet18", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "regnet_y_400mf", "googlenet"]


def build(torchvision, name):
    torch.manual_seed(0)
    keywords = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return getattr(torchvision.models, name)(num_classes=5, **keywords)


def without_randomness(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_with_closed_limits_a_converted_model_trains_as_before(torchvision, name):
    model = without_randomness(build(torchvision, name)).double()
    converted = brn.convert_batchnorm(copy.deepcopy(model), schedule=brn.ClipSchedule.batchnorm(), momentum=None)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in converted.modules())
    assert list(converted.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    dy = torch.randn(2, 5, dtype=torch.float64)
    for net in (model, converted):
        net(x).backward(dy)
    assert_gradients_close(model, converted)
    for buffer, value in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[buffer], value, rtol=1e-9, atol=1e-9, msg=buffer)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf"])
def test_built_with_norm_layer_it_trains_and_reverts(torchvision, name):
    """What takes ``norm_layer=`` takes ours; other eps and momenta of a family are then ours to give."""
    torch.manual_seed(0)
    norm_layer = functools.partial(brn.BatchRenorm2d, schedule=brn.ClipSchedule.constant(2, 1))
    model = getattr(torchvision.models, name)(num_classes=5, norm_layer=norm_layer)
    layers = [m for m in model.modules() if isinstance(m, brn.BatchRenorm2d)]
    assert layers and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    y = model(torch.randn(2, 3, 64, 64))
    y.backward(torch.randn_like(y))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert all(layer.num_batches_tracked == 1 and layer.running_mean.abs().max() > 0 for layer in layers)
    x = torch.randn(1, 3, 64, 64)
    expected = model.eval()(x)
    assert torch.equal(brn.revert_to_batchnorm(model)(x), expected)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_reverted_models_evaluate_alike_and_exchange_checkpoints(torchvision, name):
    model = brn.convert_batchnorm(build(torchvision, name), schedule=brn.ClipSchedule.constant(2, 1))
    model(torch.randn(2, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    expected = model.eval()(x)
    reverted = brn.revert_to_batchnorm(copy.deepcopy(model))
    assert repr(reverted) == repr(build(torchvision, name)).replace("momentum=0.1", "momentum=0.01")
    assert torch.equal(reverted(x), expected)
    fresh = build(torchvision, name).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(x), expected)
    model.load_state_dict(fresh.state_dict(), strict=True)


def test_convolutions_fold_after_reverting(torchvision):
    """Deployment: PyTorch's own fusion of convolution and BatchNorm works on what a revert leaves."""
    model = brn.convert_batchnorm(build(torchvision, "resnet18"))
    model(torch.randn(2, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    expected = model.eval()(x)
    folded = torch.fx.experimental.optimization.fuse(brn.revert_to_batchnorm(model))
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in folded.modules())
    torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-4)
