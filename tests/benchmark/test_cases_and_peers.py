"""What the benchmark measures: the layers are those of the networks, and every peer computes what it should."""

import csv
import math

import pytest
import torch
from tolerances import assert_close
from torch.utils._device import _device_constructors

from bench import cases, layers, networks, peers
from bench.cases import ALL_PEERS, Case, Layer, Plan


@pytest.mark.parametrize("net", networks.NETWORKS)
def test_the_table_of_layers_is_that_of_the_networks(net, monkeypatch):
    monkeypatch.undo()  # torch.device("meta") knows only PyTorch's own torch.empty
    _device_constructors.cache_clear()
    try:
        found = networks.normalizations(networks.NETWORKS[net])
    except ImportError as error:
        pytest.skip(str(error))
    recorded = {(layer.channels, layer.size, layer.follows): layer.count for layer in cases.layers_of(net)}
    assert recorded == dict(found)


def test_resnet50_as_counted_by_hand():
    layers_ = cases.layers_of("ResNet-50")
    assert sum(layer.count for layer in layers_) == 53
    # 16 blocks end in an addition; 4 of them have a normalization in the shortcut, which nothing of its own follows
    assert sum(layer.count for layer in layers_ if layer.follows == "add_relu") == 16
    assert sum(layer.count for layer in layers_ if layer.follows == "plain") == 4
    with networks.TABLE.open() as file:
        assert {row["net"] for row in csv.DictReader(file)} == set(networks.NETWORKS)


def test_a_plan_has_every_axis_and_repeats_nothing():
    plan = Plan()
    found = plan.cases()
    assert len(found) == len(set(map(str, found))) == len(set(found))
    of_nets = [case for case in found if case.layer.net in networks.NETWORKS]
    assert {case.layer.net for case in of_nets} == set(networks.NETWORKS)
    assert {case.state for case in found} == set(cases.STATES)
    for form in cases.MAIN_FORMATS:
        sizes = [case.bytes for case in found if case.layer.net == cases.SIZES and (case.dtype, case.layout) == form]
        assert min(sizes) == 2**12 and max(sizes) == 2**32
        assert {c.layer.channels for c in found if c.layer.net == cases.CHANNELS} == set(cases.SWEPT_CHANNELS)
    assert all(math.prod(case.layer.shape) // case.layer.channels > 1 for case in found)


def test_necessary_bytes_count_every_tensor_once():
    plain = Case(Layer("x", 2, 4, (8, 8), "relu"), "bfloat16", "contiguous")
    adding = Case(Layer("x", 2, 4, (8, 8), "add_relu"), "float32", "contiguous")
    assert plain.bytes == 2 * 4 * 64 * 2 and adding.bytes == 2 * 4 * 64 * 4
    assert [plain.necessary_bytes(d) // plain.bytes for d in cases.DIRECTIONS] == [2, 3, 5]
    assert [adding.necessary_bytes(d) // adding.bytes for d in cases.DIRECTIONS] == [3, 4, 7]


SMALL = [
    Layer("x", 4, 12, (6, 6), "relu"),
    Layer("x", 4, 12, (6, 6), "add_relu"),
    Layer("x", 4, 12, (6, 6), "silu"),
    Layer("x", 4, 12, (6, 6), "add"),
    Layer("x", 3, 12, (4, 4, 4), "hardswish"),
]


@pytest.mark.parametrize("state", cases.STATES)
@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_every_peer_agrees_with_float64(layer, state, monkeypatch):
    monkeypatch.setattr(peers, "compiled", lambda model: model)
    for form in (("float32", "contiguous"), ("bfloat16", "channels_last")):
        case = Case(layer, *form, state=state, peers=ALL_PEERS)
        _, models, faults = layers.prepare(case, torch.device("cpu"))
        assert [fault["error"] for fault in faults] == ["GPUs only"] * 3
        assert list(models)[0] == peers.OURS and len(models) == (6 if state == "open" else 7)


def test_the_share_of_clipped_channels_is_what_the_state_says():
    layer = Layer("x", 4, 100, (6, 6), "plain")
    for state, share in (("open", 0), ("clip 1", 1), ("clip 10", 10), ("clip 100", 100)):
        case = Case(layer, "float32", "contiguous", state=state)
        tensors, models, _ = layers.prepare(case, torch.device("cpu"))
        for _ in range(3):
            tensors.run(models[peers.OURS])
        assert int(models[peers.OURS].norm.clipped.sum()) == share


def test_wrong_results_of_ours_are_not_timed(monkeypatch):
    forward = peers.Ours.forward
    monkeypatch.setattr(peers.Ours, "forward", lambda self, *tensors: forward(self, *tensors) * 1.1)
    case = Case(SMALL[0], "float32", "contiguous")
    with pytest.raises(layers.WrongResults, match="wrong y"):
        layers.measure(case, torch.device("cpu"), directions=["both"], seconds=0)


def test_wrong_gradients_of_ours_are_not_timed(monkeypatch):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    forward = peers.Ours.forward
    monkeypatch.setattr(peers.Ours, "forward", lambda self, *tensors: Double.apply(forward(self, *tensors)))
    with pytest.raises(layers.WrongResults, match="wrong dx"):
        layers.measure(Case(SMALL[0], "float32", "contiguous"), torch.device("cpu"), directions=["both"], seconds=0)


def test_a_peer_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    def broken(self, x, residual=None):
        raise ValueError("not today\nmore")

    monkeypatch.setattr(peers.BatchNorm, "forward", broken)
    case = Case(SMALL[0], "float32", "contiguous")
    rows = layers.measure(case, torch.device("cpu"), directions=["forward"], seconds=0)
    assert [row["error"] for row in rows if row["candidate"].startswith("BatchNorm")] == ["ValueError: not today"]
    assert {row["candidate"] for row in rows if not row["error"]} == {peers.OURS, layers.COPY}


def test_brn_of_syncbatchnorms_operators(monkeypatch):
    """The composition; the operators exist on GPUs only, so that here they are written out."""

    def dims(x):
        return (0, *range(2, x.dim()))

    def wide(values, x):
        return values.view(-1, *(1,) * (x.dim() - 2))

    def stats(x, eps):
        var, mean = torch.var_mean(x.float(), dims(x), correction=0)
        return mean, (var + eps).rsqrt()

    def elemt(x, weight, bias, mean, inv_std, eps):
        y = (x.float() - wide(mean, x)) * wide(inv_std * weight, x) + wide(bias, x)
        return y.to(x.dtype)

    def reduce(dy, x, mean, inv_std, weight, *wanted):
        centered = x.float() - wide(mean, x)
        sum_dy, sum_dy_xmu = dy.float().sum(dims(x)), (dy.float() * centered).sum(dims(x))
        return sum_dy, sum_dy_xmu, sum_dy_xmu * inv_std, sum_dy

    def backward(dy, x, mean, inv_std, weight, sum_dy, sum_dy_xmu, count):
        of_x = wide(inv_std.square() * sum_dy_xmu / count, x) * (x.float() - wide(mean, x))
        return ((dy.float() - wide(sum_dy / count, x) - of_x) * wide(inv_std * weight, x)).to(x.dtype)

    operators = {"stats": stats, "elemt": elemt, "backward_reduce": reduce, "backward_elemt": backward}
    for name, function in operators.items():
        monkeypatch.setattr(torch, f"batch_norm_{name}", function)
    for layer in SMALL:
        case = Case(layer, "float32", "channels_last", state="clip 10")
        tensors, models, _ = layers.prepare(case, torch.device("cpu"))
        truth = layers.Truth.of(case, tensors, models[peers.OURS])
        peer = peers.BatchRenormOfSyncOperators(models[peers.OURS].norm, layer)
        assert truth.fault(tensors, peer) is None
        parameters = [
            torch.autograd.grad(tensors.run(model), [*model.parameters()], tensors.dy)
            for model in (peer, models[peers.OURS])
        ]
        for theirs, ours in zip(*parameters, strict=True):
            assert_close(theirs, ours.double())
