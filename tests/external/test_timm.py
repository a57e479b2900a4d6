"""timm's BatchNormAct2d keeps its drop and act; whole timm models convert and revert."""

import copy
import warnings

import pytest
import torch
from one_step import OPEN, OPEN_NORM_LAYER, check_training_and_reverting
from tolerances import assert_close, assert_gradients_close
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


FAMILIES = [  # the smallest of each, and what has timm build it with BatchNorm
    ("resnet18", {}),
    ("resnetv2_18", {}),
    ("efficientnet_b0", {}),
    ("mobilenetv3_small_050", {}),
    ("regnetx_002", {}),
    ("convnext_atto", {"norm_layer": nn.BatchNorm2d}),
]
EACH_FAMILY = pytest.mark.parametrize("name, keywords", FAMILIES, ids=[name for name, _ in FAMILIES])


def build(timm, name, keywords):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.0, **keywords)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert count > 10
    return model, count


@EACH_FAMILY
def test_with_closed_limits_a_converted_model_trains_as_before(timm, name, keywords):
    model, count = build(timm, name, keywords)
    model.double()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 0.01
    converted = brn.convert_batchnorm(copy.deepcopy(model), schedule=brn.ClipSchedule.batchnorm())
    assert sum(isinstance(m, brn.BatchRenorm2d) for m in converted.modules()) == count
    x, dy = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    for net in (model, converted):
        net(x).backward(dy)
    assert_gradients_close(model, converted)
    reverted = brn.revert_to_batchnorm(converted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(reverted.eval()(x), model.eval()(x))


@EACH_FAMILY
def test_with_open_limits_a_converted_model_trains_and_reverts(timm, name, keywords):
    model, count = build(timm, name, keywords)
    check_training_and_reverting(brn.convert_batchnorm(model, schedule=OPEN), count)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_built_with_norm_layer_it_trains_and_reverts(timm, name):
    torch.manual_seed(0)
    check_training_and_reverting(timm.create_model(name, num_classes=5, norm_layer=OPEN_NORM_LAYER))


NOT_IN_TIMMS_LIST = (AssertionError, "No equivalent norm_act layer for batchrenorm2d")


@pytest.mark.parametrize(
    "name, error",
    [
        ("resnetv2_18", NOT_IN_TIMMS_LIST),
        ("efficientnet_b0", NOT_IN_TIMMS_LIST),
        ("regnetx_002", NOT_IN_TIMMS_LIST),
        ("mobilenetv3_small_050", (TypeError, "multiple values for keyword argument 'norm_layer'")),
    ],
)
def test_a_norm_layer_that_timm_does_not_take_is_refused_by_timm(timm, name, error):
    """These families ask timm's list for a norm with activation: a model never comes out half converted."""
    with pytest.raises(error[0], match=error[1]):
        timm.create_model(name, norm_layer=OPEN_NORM_LAYER)


def test_timms_freezing_does_not_know_our_layers(timm):
    layer = timm.utils.model.freeze_batch_norm_2d(nn.Sequential(brn.BatchRenorm2d(3)))[0]
    assert type(layer) is brn.BatchRenorm2d and layer.training


def test_nothing_is_done_or_said_where_there_is_no_batchnorm(timm):
    model = timm.create_model("convnext_atto", num_classes=5)
    types = [type(m) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        brn.convert_batchnorm(model)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_branches_merge_after_reverting(timm, name):
    """timm folds convolutions and their BatchNorm into one convolution for inference."""
    model, _ = build(timm, name, {})
    brn.convert_batchnorm(model, schedule=OPEN).double()
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model.eval()(x).detach()
    with pytest.raises(AssertionError):
        timm.utils.reparameterize_model(model)  # of a copy
    merged = timm.utils.reparameterize_model(brn.revert_to_batchnorm(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert_close(merged(x), expected)


@pytest.mark.parametrize("name, node", [("resnet18", "layer2"), ("efficientnet_b0", "blocks.2")])
def test_features_of_a_converted_model_can_be_extracted(timm, name, node):
    """By torch.fx, whose graph has our layers as one node each."""
    model, _ = build(timm, name, {})
    brn.convert_batchnorm(model).eval()
    x = torch.randn(1, 3, 64, 64)
    seen = []
    model.get_submodule(node).register_forward_hook(lambda module, arguments, y: seen.append(y))
    model(x)
    (features,) = timm.models.create_feature_extractor(model, [node])(x).values()
    assert torch.equal(features, seen[0])
