"""``recompute_activations``: what is kept, and when it is freed."""

import gc
import weakref

import pytest
import torch
from fused_networks import NETWORKS
from recompute_tools import Keep, interpreted, normal, trained_layer
from torch import nn

import brn_kernels as brn
from bench.saved_bytes import SavedBytes
from brn_kernels import recompute

BYTES = {"resnet50": 0.85, "resnet18": 0.77, "efficientnet_b0": 0.6, "unet": 0.6}

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_kept(device, name):
    """Against the network with ``nn.BatchNorm2d``, whose ReLUs are in place."""
    x = normal(2, 3, 64, 64, device=device)
    bytes_kept = []
    for fused in (False, True):
        model = NETWORKS[name](fused).to(device)
        with SavedBytes(model) as kept:
            loss = model(x) if not fused else brn.recompute_activations()(model.forward)(x)
            loss = loss.square().mean()
        bytes_kept.append(kept.bytes)
    ratio = bytes_kept[1] / bytes_kept[0]
    assert ratio <= BYTES[name], f"{ratio:.3f}"
    loss.backward()


def test_a_bottleneck_keeps_what_the_design_says(backend, device):
    """The convolutions' outputs, the block's, and a bit for each of its values; the two inner activations go."""
    torch.manual_seed(0)
    c = [nn.Conv2d(i, o, k, padding=k // 2, bias=False, device=device) for i, o, k in ((8, 2, 1), (2, 2, 3), (2, 8, 1))]
    n = [brn.BatchRenorm2d(i, activation="relu", device=device) for i in (2, 2, 8)]
    x = normal(2, 8, 8, 8, device=device).requires_grad_()
    with SavedBytes(nn.ModuleList([*c, *n])) as kept, brn.recompute_activations():
        h = n[1](c[1](n[0](c[0](x))))
        y = n[2](c[2](h), residual=x).square()
        del h
    values = 2 * 8 * 8
    expected = 4 * values * (8 + 2 + 2 + 8 + 8) + values * 8 // 8  # x, the convolutions, y; bits
    assert expected <= kept.bytes <= expected + 4 * 7 * 12 * 2, kept.shapes
    y.sum().backward()


def test_nothing_waits_for_the_garbage_collector(backend, device):
    """Inputs and outputs of nodes that save them: whatever holds them must not be a cycle."""
    if interpreted(backend, device):
        pytest.skip("Triton's interpreter itself leaves cycles behind")
    layers = [trained_layer(3, 3, device, activation="silu"), nn.Conv1d(3, 3, 1, device=device), nn.Sigmoid()]
    x = normal(2, 3, 5, device=device)
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            with brn.recompute_activations():
                parts = [layers[0](layers[1](x))]
                parts.append(layers[2](layers[1](parts[0])))
                parts.append(torch.cat([parts[0], parts[1]], 1).exp())
                loss = parts[-1].sum()
                references = [weakref.ref(part) for part in parts]
                memory = [recompute.StorageWeakRef(part.untyped_storage()) for part in parts]
            if backward:
                loss.backward()
            del loss, parts
            assert not any(reference() for reference in references)
            assert all(part.expired() for part in memory)
            assert not recompute._outputs
    finally:
        gc.enable()


def test_a_backward_frees_what_it_used_though_the_loss_lives(backend, device):
    layer, conv = trained_layer(3, 3, device), nn.Conv1d(3, 3, 1, device=device)
    with SavedBytes() as kept, brn.recompute_activations():
        loss = conv(layer(conv(normal(2, 3, 5, device=device)))).sum()
        loss.backward()
        gc.collect()  # of Triton's interpreter; what the loss holds stays
        assert kept.bytes <= sum(4 * p.numel() for p in [*conv.parameters(), *layer.parameters()])
        assert not recompute._outputs


def test_several_consumers_compute_once_while_it_lives(backend, device, monkeypatch):
    layer = trained_layer(3, 3, device, activation="relu")
    made = []
    output = recompute._LayerRecipe._computed
    monkeypatch.setattr(recompute._LayerRecipe, "_computed", lambda recipe: made.append(1) or output(recipe))
    with brn.recompute_activations():
        y = layer(normal(2, 3, 5, device=device).requires_grad_())
        loss = (y * y).sum()
    expected = y.detach().clone()
    loss.backward()
    assert len(made) == 1
    seen = []
    with brn.recompute_activations():
        y = layer(normal(2, 3, 5, device=device).requires_grad_())
        outputs = [Keep.apply(y, seen).sum(), Keep.apply(y, seen).sum()]
    made.clear()
    sum(outputs).backward()
    assert len(made) == 1 and seen[0].data_ptr() == seen[1].data_ptr() and seen[0].shape == expected.shape


def test_addresses_that_are_used_again_are_not_mistaken(device):
    """Many outputs that die at once: what gets their memory is another tensor."""
    layer = trained_layer(3, 3, device)
    x = normal(4, 3, 64, device=device).requires_grad_()
    losses, seen = [], []
    with brn.recompute_activations():
        for k in range(20):
            y = layer(x)
            version = y._version
            losses.append(y.mean())  # saves no y
            del y
            other = torch.full((4, 3, 64), float(k), device=device) * x
            for _ in range(version):
                other.add_(0)
            seen.append((other.detach().clone(), []))
            losses.append(Keep.apply(other, seen[-1][1]).sum())
            del other
    sum(losses).backward()
    assert all(torch.equal(expected, got[0]) for expected, got in seen)


def test_the_address_of_an_output_is_not_used_again_while_it_may_be_looked_up(device):
    layer = trained_layer(3, 3, device)
    x = normal(4, 3, 64, device=device).requires_grad_()
    with brn.recompute_activations():
        y = layer(x)
        address = y.untyped_storage()._cdata
        loss = y.mean()  # keeps the layer's node, not y
        del y
        others = [torch.zeros(1, device=device) for _ in range(1000)]
        assert address in recompute._outputs
        assert all(other.untyped_storage()._cdata != address for other in others)
    loss.backward()
