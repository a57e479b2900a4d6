"""What a layer remembers: checkpoints, resuming, copies, evaluation."""

import copy
import io
import pickle

import pytest
import torch

import brn_kernels as brn

KINDS = pytest.mark.parametrize("kind, shape", [("1d", (4, 3, 5)), ("2d", (4, 3, 5, 2)), ("3d", (4, 3, 2, 3, 2))])
RAMP = brn.ClipSchedule(r_max=1.3, d_max=0.3, hold=2, r_ramp=6, d_ramp=4)


def layer_of(kind, **keywords):
    return getattr(brn, f"BatchRenorm{kind}")(3, **keywords)


def train(layer, steps, device, start=0):
    outputs = []
    for step in range(start, start + steps):
        x = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(step)).to(device)
        outputs.append(layer(x * 2 + 1))
    return outputs


@KINDS
@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
def test_state_dict_is_batchnorms_strict_both_ways(kind, shape, arguments):
    ours = layer_of(kind, **arguments)
    torchs = getattr(torch.nn, f"BatchNorm{kind}")(3, **{k: v for k, v in arguments.items() if k != "bias"})
    if "bias" in arguments:
        torchs.register_parameter("bias", None)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    ours.load_state_dict(torchs.state_dict(), strict=True)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in torchs.state_dict().items()}


def test_checkpoint_from_before_num_batches_tracked_loads():
    state = brn.BatchRenorm1d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    brn.BatchRenorm1d(3).load_state_dict(state, strict=True)


@pytest.mark.parametrize("stop", range(1, 9))
def test_run_resumed_in_mid_ramp_continues_bitwise(backend, device, stop):
    straight = brn.BatchRenorm2d(3, schedule=RAMP, momentum=0.1, device=device)
    expected = train(straight, 10, device)
    first = brn.BatchRenorm2d(3, schedule=RAMP, momentum=0.1, device=device)
    train(first, stop, device)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = brn.BatchRenorm2d(3, schedule=RAMP, momentum=0.1, device=device)
    resumed.load_state_dict(torch.load(file))
    assert "clipped" not in first.state_dict() and not resumed.clipped.any()
    found = train(resumed, 10 - stop, device, start=stop)
    assert all(torch.equal(p, q) for p, q in zip(expected[stop:], found, strict=True))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike(backend, device, copied):
    layer = brn.BatchRenorm2d(3, schedule=RAMP, activation="relu", bias=False, momentum=None, device=device)
    train(layer, 4, device)
    if copied == "deepcopy":
        other = copy.deepcopy(layer)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert repr(other) == repr(layer)
    assert torch.equal(other.clipped, layer.clipped)
    for a, b in zip(train(layer, 4, device, 4), train(other, 4, device, 4), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(layer.running_var, other.running_var)


@KINDS
def test_evaluation_is_torchs_batch_norm(device, kind, shape):
    layer = layer_of(kind, device=device)
    x = torch.randn(shape, device=device)
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    expected = torch.nn.functional.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
    )
    assert torch.equal(layer.eval()(x), expected)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_evaluation_adds_the_residual_activates_and_masks(device):
    layer = brn.BatchRenorm1d(3, activation="silu", device=device).eval()
    x, residual = torch.randn(4, 3, 5, device=device), torch.randn(4, 3, 5, device=device)
    mask = torch.rand(4, 5, device=device) < 0.5
    expected = torch.nn.functional.silu(x / (1 + 1e-5) ** 0.5 + residual) * mask[:, None]
    assert torch.allclose(layer(x, residual, mask), expected, atol=1e-6)


def test_reset_forgets_everything(device):
    layer = brn.BatchRenorm2d(3, schedule=brn.ClipSchedule.constant(1.01, 0.01), device=device)
    train(layer, 2, device)
    assert layer.clipped.any()
    layer.reset_parameters()
    fresh = brn.BatchRenorm2d(3, device=device)
    for name, value in fresh.named_buffers():
        assert torch.equal(value, dict(layer.named_buffers())[name])


def test_batchnorms_constructor_works_and_bad_arguments_do_not():
    layer = brn.BatchRenorm2d(8, 1e-3, 0.2, False, True, "cpu", torch.float64)
    assert (layer.eps, layer.momentum, layer.affine, layer.running_var.dtype) == (1e-3, 0.2, False, torch.float64)
    for arguments, name in [
        ({"eps": 0.0}, "eps"), ({"eps": -1e-5}, "eps"), ({"eps": float("nan")}, "eps"), ({"momentum": "x"}, "momentum"),
        ({"momentum": float("inf")}, "momentum"), ({"activation": "gelu"}, "activation"), ({"schedule": 3}, "schedule"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            brn.BatchRenorm2d(8, **arguments)


def test_statistics_are_frozen_while_tracking_is_off(backend, device):
    """As in nn.BatchNorm, switching track_running_stats off on a layer that has statistics keeps them unchanged."""
    layer = brn.BatchRenorm2d(3, device=device)
    layer.track_running_stats = False
    before = copy.deepcopy(dict(layer.named_buffers()))
    train(layer, 1, device)
    assert all(torch.equal(before[name], value) for name, value in layer.named_buffers())


def test_a_layer_made_on_meta_and_loaded_by_assignment_trains(backend, device):
    """One tensor left on meta sent the whole call to the fake kernel: the output was uninitialized memory."""
    with torch.device("meta"):
        layer = brn.BatchRenorm2d(3)
    checkpoint = {name: value.to(device) for name, value in torch.nn.BatchNorm2d(3).state_dict().items()}
    layer.load_state_dict(checkpoint, assign=True)
    x = torch.randn(4, 3, 5, 2, device=device)
    assert torch.equal(layer(x), brn.BatchRenorm2d(3, device=device)(x))
    assert layer.num_batches_tracked.item() == 1 and not layer.running_mean.eq(0).any()


def test_half_statistics_loaded_by_assignment_become_float32():
    layer = brn.BatchRenorm2d(3).bfloat16()
    layer.load_state_dict(torch.nn.BatchNorm2d(3).bfloat16().state_dict(), assign=True)
    assert layer.weight.dtype == torch.bfloat16 and layer.running_var.dtype == torch.float32


@pytest.mark.parametrize("name", ["num_batches_tracked", "clipped"])
def test_a_buffer_on_another_device_is_told(name):
    layer = brn.BatchRenorm2d(3)
    layer._buffers[name] = layer._buffers[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu as x, got one on meta"):
        layer(torch.randn(4, 3, 2, 2))
    assert not layer.running_mean.any()


def test_numpy_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    layer = brn.BatchRenorm2d(
        3, numpy.float32(1e-3), numpy.float32(0.5), schedule=brn.ClipSchedule.for_training(numpy.int64(1000))
    )
    layer(torch.randn(4, 3, 2, 2))
    assert brn.ClipSchedule(r_max=numpy.float32(2), hold=numpy.int64(5)).limits(5)[0] == 1
