"""What a layer with ``ClipSchedule.auto()`` keeps: checkpoints, copies, conversions."""

import copy
import io
import pickle

import pytest
import torch
from test_auto_schedule import AUTO, SEEN, batch, layer_of, train
from torch import nn

import brn_kernels as brn
from brn_kernels.backends import auto_limits


@pytest.mark.many_steps
@pytest.mark.parametrize("stop", [1, 2, SEEN - 1, SEEN, 20])
@pytest.mark.parametrize("by", ["state_dict", "pickle", "deepcopy"])
def test_a_run_resumed_continues_to_the_bit(backend, device, stop, by):
    straight, first = layer_of(device=device, dtype=torch.float32), layer_of(device=device, dtype=torch.float32)
    expected = train(straight, 24, dtype=torch.float32)
    train(first, stop, dtype=torch.float32)
    if by == "state_dict":
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed = layer_of(device=device, dtype=torch.float32)
        resumed.load_state_dict(torch.load(file), strict=True)
    else:
        resumed = pickle.loads(pickle.dumps(first)) if by == "pickle" else copy.deepcopy(first)
        assert resumed.schedule == AUTO and repr(resumed) == repr(first)
    found = train(resumed, 24 - stop, stop, dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(expected[stop:], found, strict=True))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", [nn.BatchNorm2d, brn.BatchRenorm2d])
def test_a_checkpoint_without_the_state_starts_it_anew(device, source, assign):
    layer = layer_of(device=device)
    train(layer, 12)
    layer.load_state_dict(source(3, dtype=torch.float64, device=device).state_dict(), strict=True, assign=assign)
    assert not layer.auto_state.any() and layer.auto_state.shape == (auto_limits.ROWS, 3)
    train(layer, 1)


def test_a_checkpoint_with_the_state_loads_into_other_schedules(device):
    layer = nn.Sequential(layer_of(device=device))
    train(layer[0], 12)
    other = nn.Sequential(layer_of(device=device, schedule=brn.ClipSchedule.paper()))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other[0].running_mean, layer[0].running_mean) and other[0].auto_state is None
    with pytest.raises(RuntimeError, match="auto_state"):
        nn.Sequential(nn.BatchNorm2d(3)).load_state_dict(layer.state_dict(), strict=True)
    nn.Sequential(nn.BatchNorm2d(3)).load_state_dict(brn.revert_to_batchnorm(layer).state_dict(), strict=True)


def test_a_partial_checkpoint_leaves_the_state(device):
    layer = layer_of(device=device)
    train(layer, 12)
    layer.load_state_dict({"weight": torch.zeros(3)}, strict=False)
    assert (layer.auto_state[auto_limits.COUNT] == 12).all()


def test_the_state_of_another_size_does_not_load(device):
    state = layer_of(device=device).state_dict()
    state["auto_state"] = state["auto_state"][:2]
    with pytest.raises(RuntimeError, match="auto_state"):
        layer_of(device=device).load_state_dict(state)


@pytest.mark.parametrize("trained", [False, True])
def test_models_convert_and_revert(device, trained):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4))).to(device)
    keys, x = list(model.state_dict()), torch.randn(4, 3, 5, 2, device=device)
    if trained:
        model(x)
    brn.convert_batchnorm(model, schedule=AUTO)
    for layer in (model[1], model[2][0]):
        assert layer.schedule == AUTO and layer.auto_state.device == layer.running_mean.device
        assert not layer.auto_state.any()
    model(x).sum().backward()
    assert "1.auto_state" in model.state_dict() and (model[1].auto_state[auto_limits.COUNT] == 1).all()
    expected = model.eval()(x)
    brn.revert_to_batchnorm(model)
    assert list(model.state_dict()) == keys and "auto_state" not in dict(model.named_buffers())
    assert torch.allclose(model(x), expected)


def test_the_buffer_comes_and_goes_with_the_schedule(device):
    layer = layer_of(device=device, schedule=brn.ClipSchedule.paper())
    assert layer.auto_state is None and "auto_state" not in layer.state_dict()
    with pytest.raises(ValueError, match="auto_limits is for layers with"):
        layer.auto_limits()
    layer.schedule = AUTO
    assert layer.auto_state.dtype == torch.float64 and layer.auto_state.device.type == device.type
    train(layer, 3)
    layer.schedule = AUTO
    assert (layer.auto_state[auto_limits.COUNT] == 3).all(), "the same schedule again forgets nothing"
    layer.schedule = brn.ClipSchedule.paper()
    assert "auto_state" not in layer.state_dict()
    train(layer, 1)


def test_reset_forgets(device):
    layer = layer_of(device=device)
    train(layer, 12)
    state = layer.auto_state
    layer.reset_running_stats()
    assert layer.auto_state is state and not state.any()


def test_update_stats_keeps_the_state(device):
    model = nn.Sequential(layer_of(device=device))
    train(model[0], 12)
    state, before = model[0].auto_state, model[0].auto_state.clone()
    brn.update_stats(model, [batch(step).to(device) for step in range(3)])
    assert model[0].auto_state is state and torch.equal(state, before) and model[0].schedule == AUTO


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16])
def test_the_state_of_a_half_layer_stays_float32(device, to):
    layer = layer_of(device=device, dtype=torch.float32)
    train(layer, 12, dtype=torch.float32)
    before = layer.auto_state.clone()
    layer.to(to)
    assert layer.auto_state.dtype == torch.float32 and torch.equal(layer.auto_state, before)
    layer(batch(12).to(device=device, dtype=to))
    assert (layer.auto_state[auto_limits.COUNT] == 13).all()


def test_without_running_statistics_it_is_batchnorm(device):
    layer = brn.BatchRenorm2d(3, schedule=AUTO, track_running_stats=False, device=device)
    x = batch(0, dtype=torch.float32).to(device)
    assert layer.auto_state is None
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3, device=device)(x), rtol=1e-5, atol=1e-5)


def test_averaged_models_carry_it(device):
    model = nn.Sequential(layer_of(device=device))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model[0], 12)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].auto_state, model[0].auto_state)


def test_a_pickle_from_before_the_state_existed_loads(device):
    layer = layer_of(device=device, schedule=brn.ClipSchedule.paper())
    old = copy.copy(layer.__dict__)
    old["schedule"] = old.pop("_schedule")
    old["_buffers"] = {name: value for name, value in old["_buffers"].items() if name != "auto_state"}
    loaded = brn.BatchRenorm2d.__new__(brn.BatchRenorm2d)
    loaded.__setstate__(old)
    assert loaded.schedule == brn.ClipSchedule.paper() and loaded.auto_state is None
    train(loaded, 1)
