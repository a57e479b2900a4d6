"""``torch.fx`` traces a layer as one node, as it does ``nn.BatchNorm2d``: folding and feature extraction need it."""

import copy

import pytest
import torch
from torch import nn

import brn_kernels as brn
from brn_kernels.convert import BatchRenormAct2d

CLIPPED = brn.ClipSchedule.constant(1.1, 0.1)


class Net(nn.Module):
    """A plain layer, one with a residual, and one with a mask unless that is to be left out."""

    def __init__(self, masked):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.plain = brn.BatchRenorm2d(4, schedule=CLIPPED)
        self.activating = brn.BatchRenorm2d(4, schedule=CLIPPED, activation="silu")
        self.masked = brn.BatchRenorm2d(4, schedule=CLIPPED) if masked else None

    def forward(self, x, mask):
        h = self.plain(self.conv(x))
        h = self.activating(h, residual=h)
        return h if self.masked is None else self.masked(h, mask=mask)


def images():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) + 1
    return x, torch.rand(4, 5, 5) < 0.7


def net(masked=True):
    torch.manual_seed(0)
    model = Net(masked).double()
    model(*images())
    return model


def layers_called(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("training", [True, False])
def test_a_traced_network_trains_and_evaluates_as_before(training):
    model = net().train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert layers_called(traced) == ["conv", "plain", "activating", "masked"]
    x, mask = images()
    dy = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    results = []
    for each in (model, traced):
        y = each(x, mask)
        y.backward(dy)
        results.append([y, *(p.grad for p in each.parameters()), *each.state_dict().values()])
    for ours, expected in zip(*reversed(results), strict=True):
        assert torch.equal(ours, expected)
    assert int(model.plain.num_batches_tracked) == (2 if training else 1)


def test_the_residual_may_come_by_position():
    layer = net().activating

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, x):
            return self.norm(x, x * 2)

    model = Positional().eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_what_a_layer_with_activation_reverts_to_is_one_node():
    model = net(masked=False).eval()  # a BatchNorm takes no mask
    batch = images()
    expected = model(*batch)
    traced = torch.fx.symbolic_trace(brn.revert_to_batchnorm(model))
    assert layers_called(traced) == ["conv", "plain", "activating"]
    assert torch.equal(traced(*batch), expected)


def test_what_timms_layer_is_converted_to_activates_once():
    layer = BatchRenormAct2d(3).eval()
    layer.drop, layer.act = nn.Identity(), nn.SiLU()
    model = nn.Sequential(layer)
    traced = torch.fx.symbolic_trace(model)
    assert layers_called(traced) == ["0"]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(traced(x), model(x))


def test_a_subclass_with_a_forward_of_its_own_is_refused_rather_than_run_twice():
    class Doubling(brn.BatchRenorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(nn.Sequential(Doubling(3)))


@pytest.mark.parametrize("make", [brn.BatchRenorm2d, nn.BatchNorm2d])
def test_a_layer_traced_by_itself_is_refused_as_batchnorm_is(make):
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(make(3))
