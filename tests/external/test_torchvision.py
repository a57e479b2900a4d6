"""Whole torchvision models: converted, trained a step, reverted."""

import copy
import importlib

import pytest
import torch
import torch.fx.experimental.optimization
from one_step import OPEN, OPEN_NORM_LAYER, check_training_and_reverting
from tolerances import assert_close, assert_gradients_close
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


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf"]
)
def test_built_with_norm_layer_it_trains_and_reverts(torchvision, name):
    """What takes ``norm_layer=`` takes ours; other eps and momenta of a family are then ours to give."""
    torch.manual_seed(0)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in build(torchvision, name).modules())
    check_training_and_reverting(getattr(torchvision.models, name)(num_classes=5, norm_layer=OPEN_NORM_LAYER), count)


@pytest.mark.parametrize("name", [*MODELS, "mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_with_open_limits_a_converted_model_trains_and_reverts(torchvision, name):
    model = build(torchvision, name)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    check_training_and_reverting(brn.convert_batchnorm(model, schedule=OPEN), count)


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


def trained_and_evaluated(model):
    """A float64 model after a step, an image, and what it predicts."""
    brn.convert_batchnorm(model, schedule=OPEN).double()
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    return model, x, model.eval()(x).detach()


def test_convolutions_fold_after_reverting(torchvision):
    """Deployment: PyTorch's own fusion of convolution and BatchNorm works on what a revert leaves."""
    model, x, expected = trained_and_evaluated(build(torchvision, "resnet18"))
    folded = torch.fx.experimental.optimization.fuse(brn.revert_to_batchnorm(model))
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in folded.modules())
    assert_close(folded(x), expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large", "googlenet"])
def test_quantizable_models_fuse_after_reverting(torchvision, name):
    torch.manual_seed(0)
    keywords = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    quantizable = importlib.import_module("torchvision.models.quantization")
    model, x, expected = trained_and_evaluated(getattr(quantizable, name)(quantize=False, num_classes=5, **keywords))
    with pytest.raises(AssertionError, match="did not find fuser method"):
        copy.deepcopy(model).fuse_model()
    fused = brn.revert_to_batchnorm(model)
    fused.fuse_model()
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in fused.modules())
    assert_close(fused(x), expected)


@pytest.mark.parametrize("reverted", [False, True])
def test_features_of_a_converted_model_can_be_extracted(torchvision, reverted):
    """It traces the model with torch.fx, in both modes, and may be asked for a normalization layer by its name."""
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    model, x, expected = trained_and_evaluated(build(torchvision, "resnet18"))
    if reverted:
        brn.revert_to_batchnorm(model)
    extractor = extraction.create_feature_extractor(model, ["bn1", "layer2.1.bn2", "fc"]).eval()
    features = extractor(x)
    assert torch.equal(features["fc"], expected)
    assert torch.equal(features["bn1"].relu(), model.bn1(model.conv1(x)).relu())  # the ReLU behind it is in place
