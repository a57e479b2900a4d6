"""From BatchNorm and back: nothing a layer carries is lost."""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import brn_kernels as brn
from brn_kernels.convert import BatchRenormAct2d

PAIRS = [
    (nn.BatchNorm1d, brn.BatchRenorm1d, (4, 3, 5)),
    (nn.BatchNorm2d, brn.BatchRenorm2d, (4, 3, 5, 2)),
    (nn.BatchNorm3d, brn.BatchRenorm3d, (4, 3, 2, 3, 2)),
]
EACH_PAIR = pytest.mark.parametrize("torchs, ours, shape", PAIRS, ids=lambda v: getattr(v, "__name__", None))


def trained(layer, shape):
    layer(torch.randn(shape, dtype=layer.weight.dtype if layer.weight is not None else None) * 2 + 1)
    return layer


@EACH_PAIR
def test_parameters_and_buffers_by_identity_there_and_back(torchs, ours, shape):
    layer = trained(torchs(3, eps=1e-3, momentum=0.3), shape)
    model = nn.Sequential(nn.Identity(), layer)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    assert brn.convert_batchnorm(model, momentum=0.02) is model
    new = model[1]
    assert type(new) is ours and (new.eps, new.momentum, new.num_features) == (1e-3, 0.02, 3)
    assert new.schedule == brn.ClipSchedule.paper()
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert not new.clipped.any()
    new.eval()
    x = torch.randn(shape)
    assert torch.equal(new(x), layer.eval()(x))
    assert brn.revert_to_batchnorm(model) is model
    assert type(model[1]) is torchs and model[1].momentum == 0.02
    assert not hasattr(model[1], "schedule") and not hasattr(model[1], "clipped")
    again = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(again) == list(before) and all(again[name] is tensor for name, tensor in before.items())
    assert torch.equal(model[1](x), new(x))
    assert repr(model[1]) == repr(torchs(3, eps=1e-3, momentum=0.02))


@EACH_PAIR
@pytest.mark.parametrize(
    "arguments",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"dtype": torch.float64}],
    ids=str,
)
def test_variants(torchs, ours, shape, arguments):
    layer = torchs(3, **arguments)
    new = brn.convert_batchnorm(layer)
    assert type(new) is ours
    assert list(new.state_dict()) == list(layer.state_dict())
    assert (new.affine, new.track_running_stats) == (layer.affine, layer.track_running_stats)
    x = torch.randn(shape, dtype=arguments.get("dtype"))
    closed = brn.convert_batchnorm(copy.deepcopy(layer), schedule=brn.ClipSchedule.batchnorm())
    dx = []
    for net in (copy.deepcopy(layer), closed):
        a = x.clone().requires_grad_()
        dx += torch.autograd.grad(net(a), a, torch.ones_like(a).cumsum(0))
    assert torch.allclose(*dx, atol=1e-5)
    back = brn.revert_to_batchnorm(new)
    assert type(back) is torchs
    assert (back.affine, back.track_running_stats) == (layer.affine, layer.track_running_stats)


def test_an_optimizer_made_before_goes_on_working():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    brn.convert_batchnorm(model)
    model(torch.randn(8, 4)).backward(torch.randn(8, 3))
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_training_flag_hooks_and_foreign_attributes_are_kept():
    calls = []
    layer = nn.BatchNorm2d(3)
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.weight.requires_grad_(False)
    layer.note = "mine"
    model = nn.Sequential(layer).eval()
    model.train()
    layer.eval()
    brn.convert_batchnorm(model)
    new = model[0]
    assert not new.training and model.training and new.note == "mine" and not new.weight.requires_grad
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    new.train()(x).backward(torch.randn(4, 3, 2, 2))
    assert calls == ["pre", "forward", "backward"]
    assert brn.revert_to_batchnorm(model)[0].note == "mine"


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    brn.convert_batchnorm(model)
    assert model["a"] is model["b"][0] and isinstance(model["a"], brn.BatchRenorm1d)


def test_the_schedule_continues_from_the_number_of_batches():
    layer = nn.BatchNorm1d(3)
    layer.num_batches_tracked.fill_(39_999)
    new = brn.convert_batchnorm(layer)
    assert new.schedule.limits(new.num_batches_tracked)[0].item() == pytest.approx(3, abs=1e-4)


def test_half_model_keeps_float32_statistics_and_reverts_to_half():
    model = nn.Sequential(nn.BatchNorm1d(3)).half()
    brn.convert_batchnorm(model)
    assert model[0].running_var.dtype == torch.float32 and model[0].weight.dtype == torch.float16
    model(torch.randn(8, 3).half())
    brn.revert_to_batchnorm(model)
    assert model[0].running_var.dtype == torch.float16
    model.eval()(torch.randn(8, 3).half())


def test_statistics_that_do_not_fit_half_are_not_thrown_away():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).half()
    brn.convert_batchnorm(model)
    model[1].running_var.fill_(1e6)
    layers = list(model)
    with pytest.raises(ValueError, match=r"running_var does not fit torch.float16: call model.float\(\)"):
        brn.revert_to_batchnorm(model)
    assert list(model) == layers, "nothing is reverted then"


def test_an_unmaterialized_lazy_layer_is_refused_and_a_materialized_one_converted():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="LazyBatchNorm1d has no shape yet"):
        brn.convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d, "nothing is converted then"
    model(torch.randn(4, 3))
    brn.convert_batchnorm(model)
    assert [type(layer) for layer in model] == [brn.BatchRenorm1d] * 2


def test_a_foreign_subclass_is_left_with_a_warning():
    class Mine(nn.BatchNorm2d):
        pass

    class MyRenorm(brn.BatchRenorm2d):
        pass

    with pytest.warns(UserWarning, match="Mine left as it is"):
        assert type(brn.convert_batchnorm(nn.Sequential(Mine(3)))[0]) is Mine
    with pytest.warns(UserWarning, match="MyRenorm left as it is"):
        assert type(brn.revert_to_batchnorm(nn.Sequential(MyRenorm(3)))[0]) is MyRenorm


def test_sync_batch_norm_converts_and_back():
    layer = nn.SyncBatchNorm(3)
    new = brn.convert_batchnorm(layer)
    assert type(new) is brn.BatchRenorm
    for shape in [(4, 3), (4, 3, 5), (4, 3, 2, 2)]:
        new(torch.randn(shape))
    assert type(brn.revert_to_batchnorm(new)) is nn.SyncBatchNorm


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "hardswish"])
@pytest.mark.parametrize("kind, shape", [("1d", (4, 3)), ("2d", (4, 3, 2, 2)), ("3d", (4, 3, 2, 2, 2))])
def test_a_layer_with_activation_reverts_and_converts_back(activation, kind, shape):
    layer = getattr(brn, f"BatchRenorm{kind}")(3, activation=activation)
    layer(torch.randn(shape))
    x, residual = torch.randn(shape), torch.randn(shape)
    expected = layer.eval()(x, residual)
    reverted = brn.revert_to_batchnorm(layer)
    assert isinstance(reverted, getattr(nn, f"BatchNorm{kind}"))
    assert torch.allclose(reverted(x, residual), expected) and torch.allclose(reverted(x), layer(x))
    assert f"activation={activation!r}" in repr(reverted)
    again = brn.convert_batchnorm(reverted)
    assert type(again) is type(layer) and again.activation == activation


def test_a_layer_without_bias_converts_back_and_forth():
    layer = brn.BatchRenorm2d(3, bias=False)
    reverted = brn.revert_to_batchnorm(layer)
    assert reverted.bias is None and reverted.weight is layer.weight
    assert brn.convert_batchnorm(reverted).bias is None
    reverted(torch.randn(4, 3, 2, 2))


def test_meta_and_deepcopied_models_convert():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    brn.convert_batchnorm(model)
    assert model[1].clipped.is_meta
    model.to_empty(device="cpu")
    model[1].reset_parameters()
    copy.deepcopy(model)(torch.randn(2, 3, 4, 4))


def test_a_copy_of_timms_interface_keeps_drop_and_act():
    """BatchNormAct2d adds drop and act after normalizing; see also tests/external/test_timm.py."""
    layer = BatchRenormAct2d(3)
    layer.drop, layer.act = nn.Identity(), nn.ReLU()
    assert (layer(torch.randn(4, 3, 2, 2)) >= 0).all()


def test_convert_sync_batchnorm_leaves_our_layers_alone():
    """It replaces every subclass of _BatchNorm by SyncBatchNorm; ours derive from _NormBase for that reason."""
    model = nn.Sequential(brn.BatchRenorm2d(3), nn.BatchNorm2d(3))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(layer) for layer in converted] == [brn.BatchRenorm2d, nn.SyncBatchNorm]


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        brn.revert_to_batchnorm(brn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Linear(3, 3))))


def test_a_pruned_layer_converts_and_reverts():
    """Pruning moves the weight out of the parameters: the new layer's own must not stay in its place."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    keys = list(model.state_dict())
    brn.convert_batchnorm(model)
    model(torch.randn(2, 4, 2, 2)).sum().backward()
    assert list(model.state_dict()) == keys and model[0].weight_orig.grad is not None
    brn.revert_to_batchnorm(model)
    model(torch.randn(2, 4, 2, 2))
    assert list(model.state_dict()) == keys


def test_a_compiled_layer_does_not_go_on_as_the_old_one():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].compile(backend="eager")
    with pytest.warns(UserWarning, match="BatchNorm2d was compiled: compile what replaces it again"):
        brn.convert_batchnorm(model, schedule=brn.ClipSchedule.unclipped())
    x = torch.randn(4, 4, 3, 3) + 5
    assert model(x).mean() > 4, "normalized by the running statistics, not by the batch"


def test_a_layer_wrapped_by_compile_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), torch.compile(nn.BatchNorm2d(4), backend="eager"))
    with pytest.raises(ValueError, match="a BatchNorm2d was compiled by itself: replace it before that"):
        brn.convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_layer_with_a_forward_of_its_own_is_left_with_a_warning():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].forward = lambda x: x
    with pytest.warns(UserWarning, match="BatchNorm2d left as it is"):
        brn.convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_hooks_of_load_state_dict_know_the_new_layer():
    model = nn.Sequential(nn.BatchNorm2d(4))
    seen = []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    brn.convert_batchnorm(model)
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]


def test_a_foreign_buffer_stays_out_of_the_state_dict():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].register_buffer("extra", torch.zeros(2), persistent=False)
    keys = list(model.state_dict())
    assert list(brn.convert_batchnorm(model).state_dict()) == keys
    assert "extra" in dict(model[0].named_buffers())
    assert list(brn.revert_to_batchnorm(model).state_dict()) == keys
