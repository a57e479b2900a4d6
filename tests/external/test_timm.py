"""timm's BatchNormAct2d keeps its drop and act; whole timm models convert and revert."""

import copy
import warnings

import pytest
import torch
from tolerances import assert_gradients_close
from torch import nn

import brn_kernels as brn


def test_batch_norm_act_keeps_drop_and_act(timm):
    layer = timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=nn.Identity)
    model = nn.Sequential(layer)
    drop, act = layer.drop, layer.act
    x = torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(model)(x)
    brn.convert_batchnorm(model, schedule=brn.ClipSchedule.batchnorm())
    assert isinstance(model[0], brn.BatchRenorm2d) and model[0].drop is drop and model[0].act is act
    torch.testing.assert_close(model(x), expected)
    brn.revert_to_batchnorm(model)
    assert type(model[0]) is timm.layers.BatchNormAct2d and model[0].drop is drop and model[0].act is act
    model[0](x)


def test_sync_batch_norm_act(timm):
    model = nn.Sequential(timm.layers.SyncBatchNormAct(3))
    model[0].drop, model[0].act = nn.Identity(), nn.ReLU()
    brn.convert_batchnorm(model)
    assert (model(torch.randn(4, 3, 5, 5)) >= 0).all()
    brn.revert_to_batchnorm(model)
    assert type(model[0]) is timm.layers.SyncBatchNormAct


@pytest.mark.parametrize(
    "name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_100", "resnetv2_50", "regnetx_002", "convnext_atto"]
)
def test_models_convert_train_and_revert(timm, name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.0).double()
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            brn.convert_batchnorm(model)  # nothing to do, nothing said
        return
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 0.01
    converted = brn.convert_batchnorm(copy.deepcopy(model), schedule=brn.ClipSchedule.batchnorm())
    assert sum(isinstance(m, brn.BatchRenorm2d) for m in converted.modules()) == sum(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    )
    x, dy = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    for net in (model, converted):
        net(x).backward(dy)
    assert_gradients_close(model, converted)
    reverted = brn.revert_to_batchnorm(converted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(reverted.eval()(x), model.eval()(x))
