"""``recompute_activations``: outputs come back to the bit."""

import pytest
import torch
from fused_networks import NETWORKS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ACTIVATIONS
from recompute_tools import (
    LAYOUTS,
    SCHEDULES,
    Keep,
    Net,
    Total,
    assert_equal,
    assert_same_bits,
    comes_back,
    interpreted,
    normal,
    run,
    spread,
    trained_layer,
)
from torch import nn

import brn_kernels as brn

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clipped", SCHEDULES)
def test_the_same_bits_come_back(backend, device, activation, dtype, layout, clipped):
    shape = (3, 19, 5, 7)
    if interpreted(backend, device):
        shape = (2, 9, 3, 4)
        if dtype not in (torch.float32, torch.bfloat16) or activation not in ("relu", "silu"):
            pytest.skip("seconds each where kernels are interpreted; test_any_shape has some of these")
    channels = shape[1]
    layer = trained_layer(4, channels, device, dtype, clipped, activation=activation)
    states = []
    for step in range(2):
        x = LAYOUTS[layout](spread(normal(*shape, seed=step, dtype=dtype, device=device))).requires_grad_()
        assert_same_bits(*reversed(comes_back(layer, x)))
        states.append(layer.clipped.sum().item())
    expected = {"unclipped": states == [0, 0], "some clipped": 0 < states[-1] < channels}
    assert expected.get(clipped, states[-1] >= channels - 1), states


@pytest.mark.parametrize(
    "arguments",
    [
        {"affine": False}, {"bias": False}, {"momentum": None}, {"track_running_stats": False}, {"momentum": 1.0},
        {"dtype": torch.float64},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_other_layers(backend, device, arguments, masked):
    dtype = arguments.get("dtype", torch.float32)
    layer = trained_layer(3, 5, device, activation="silu", **arguments)
    for step in range(2):
        x = spread(normal(4, 5, 6, seed=step, dtype=dtype, device=device)).requires_grad_()
        mask = normal(4, 6, seed=step, device=device) < 0.5 if masked else None
        expected, actual = comes_back(layer, x, mask)
        assert_same_bits(actual, expected)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).filter(lambda s: s[0] * torch.Size(s[2:]).numel() > 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(sorted(LAYOUTS)), activation=st.sampled_from(list(ACTIVATIONS)),
    clipped=st.sampled_from(sorted(SCHEDULES)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(backend, device, shape, dtype, layout, activation, clipped, seed):
    layer = trained_layer(len(shape), shape[1], device, dtype, clipped, activation=activation)
    for step in range(1 if interpreted(backend, device) else 2):
        x = LAYOUTS[layout](spread(normal(*shape, seed=seed + step, dtype=dtype, device=device))).requires_grad_()
        expected, actual = comes_back(layer, x)
        assert_same_bits(actual, expected)


def test_large_enough_for_several_splits(backend, device, request):
    shape = (16, 70, 70, 70)
    if interpreted(backend, device):
        request.getfixturevalue("tiny_tiles")
        shape = (3, 19, 9, 8)
    for layout in LAYOUTS.values():
        layer = trained_layer(4, shape[1], device, activation="silu")
        x = layout(spread(normal(*shape, device=device))).requires_grad_()
        for _ in range(2):
            expected, actual = comes_back(layer, x)
            assert_same_bits(actual, expected)


def test_nan_and_infinity_come_back(backend, device):
    layer = trained_layer(3, 4, device, activation="relu")
    x = normal(4, 4, 6, device=device)
    x[0, 0, 0], x[1, 1, 1], x[0, 3] = float("nan"), float("inf"), 3e38
    expected, actual = comes_back(layer, x.requires_grad_())
    assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert expected.isnan().any()


def test_an_empty_batch(backend, device):
    layer = trained_layer(3, 4, device)
    with brn.recompute_activations():
        Keep.apply(layer(torch.empty(0, 4, 3, device=device, requires_grad=True)), []).sum().backward()


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_is_the_same_to_the_bit(backend, device, inside, layout):
    torch.manual_seed(0)
    model, x = Net().to(device=device, memory_format=layout), normal(3, 6, 8, 8, device=device)
    expected = run(model, x, on=False, layout=layout)
    assert_equal(run(model, x, on=True, backward_inside=inside, layout=layout), expected)


@pytest.mark.parametrize("name", ["resnet18", "unet"])
def test_networks_train_the_same(device, name):
    torch.manual_seed(0)
    model = NETWORKS[name](True).to(device)
    loss = nn.Sequential(model, nn.Softmax(1), nn.Flatten())
    expected = run(nn.Sequential(loss, Total()), normal(2, 3, 64, 64, device=device), on=False)
    assert_equal(run(nn.Sequential(loss, Total()), normal(2, 3, 64, 64, device=device), on=True), expected)
