"""``recompute_activations``: views, joined and modified outputs, graphs walked more than once."""

import copy

import pytest
import torch
from recompute_tools import LAYOUTS, Keep, assert_equal, is_freed, normal, trained_layer
from torch import nn

import brn_kernels as brn
from brn_kernels import recompute

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y[:, 1], lambda y: y.flatten(1), lambda y: y.transpose(1, 2), lambda y: y[1:, :, ::2],
        lambda y: y[0, 0, 0], lambda y: y.unfold(2, 3, 1), lambda y: y.unsqueeze(0).expand(4, -1, -1, -1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_views(backend, device, view, layout):
    layer = trained_layer(3, 3, device)
    seen = []
    with brn.recompute_activations():
        y = layer(LAYOUTS[layout](normal(2, 3, 5, device=device)).requires_grad_())
        expected = view(y.detach().clone(memory_format=torch.preserve_format))
        storage = recompute.StorageWeakRef(y.untyped_storage())
        loss = Keep.apply(view(y), seen).sum()
        del y
    assert is_freed(storage)
    loss.backward()
    assert torch.equal(seen[0], expected) and seen[0].stride() == expected.stride()


def test_views_of_another_kind_are_kept(device):
    layer = trained_layer(3, 3, device)
    seen = []
    with brn.recompute_activations():
        y = layer(normal(2, 3, 4, device=device).requires_grad_())
        expected = torch.view_as_complex(y.detach().clone().unflatten(2, (2, 2)))
        loss = Keep.apply(torch.view_as_complex(y.unflatten(2, (2, 2))), seen).abs().sum()
        loss = loss + Keep.apply(torch._neg_view(y), seen).sum()
        negated = -y.detach()
        del y
    loss.backward()
    assert any(torch.equal(s, expected) for s in seen if s.is_complex())
    assert any(torch.equal(s, negated) for s in seen if not s.is_complex())


def joined(device, dim, make):
    torch.manual_seed(0)
    layers = [trained_layer(3, 3, device, activation="relu") for _ in range(3)]
    x = normal(2, 3, 5, device=device).requires_grad_()
    seen = []
    with brn.recompute_activations():
        parts = make([layer(x + k) for k, layer in enumerate(layers)], x)
        whole = torch.cat(parts, dim)
        del parts
        expected = whole.detach().clone()
        storage = recompute.StorageWeakRef(whole.untyped_storage())
        loss = Keep.apply(whole, seen).sum() + Keep.apply(whole[:, 1:], seen).sum()
        del whole
    freed = is_freed(storage)
    loss.backward()
    for tensor in seen:
        assert torch.equal(tensor, expected[:, expected.shape[1] - tensor.shape[1] :])
    return freed


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_joined_outputs_are_computed_again(backend, device, dim):
    assert joined(device, dim, lambda ys, x: ys)
    assert joined(device, dim, lambda ys, x: [ys[0], x * 2, ys[1]])
    assert joined(device, dim, lambda ys, x: [ys[0], ys[0]])


def modified(ys):
    with torch.no_grad():
        ys[0].mul_(2)
    return ys


@pytest.mark.parametrize(
    "make",
    [
        lambda ys, x: [ys[0], x * 2, x * 3],  # less than half
        lambda ys, x: [ys[0], x.detach(), ys[1]],  # of unknown size
        lambda ys, x: modified(ys),
        lambda ys, x: [ys[0].mul_(2), ys[1]],
        lambda ys, x: [y.double() for y in ys],
        lambda ys, x: [ys[0], x.double() * 2, ys[2]],
    ],
)
def test_other_joined_tensors_are_kept(device, make):
    if make.__code__.co_names == ("modified",):
        # the first part is as the forward left it no more: where it is not alone, nothing is computed again
        assert not joined(device, 1, lambda ys, x: modified(ys)[:1] + [x * 1, x * 2])
        joined(device, 1, make)
    else:
        joined(device, 1, make)


def test_an_output_modified_before_it_is_saved_is_kept(backend, device):
    layer = trained_layer(3, 3, device)
    seen = []
    x = normal(2, 3, 5, device=device).requires_grad_()
    for how in (lambda y: y.mul_(2), lambda y: modified([y])[0], lambda y: nn.functional.relu(y, inplace=True)):
        seen.clear()
        with brn.recompute_activations():
            y = how(layer(x))
            expected = y.detach().clone()
            loss = Keep.apply(y, seen).sum()
            del y
        loss.backward()
        assert torch.equal(seen[0], expected)


def test_an_output_modified_after_it_was_saved_is_recomputed_as_it_was(backend, device):
    layer = trained_layer(3, 3, device)
    seen = []
    with brn.recompute_activations():
        y = layer(normal(2, 3, 5, device=device).requires_grad_())
        expected = y.detach().clone()
        loss = Keep.apply(y, seen).sum()
        y.mul_(2)
    loss.backward()
    assert torch.equal(seen[0], expected)


def test_an_input_modified_after_the_forward_is_an_error(backend, device):
    layer, conv = trained_layer(3, 3, device), nn.Conv1d(3, 3, 1, device=device)
    with brn.recompute_activations():
        x = conv(normal(2, 3, 5, device=device))
        loss = conv(layer(x)).sum()
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: the input of Batch Renorm.*\[2, 3, 5\]"):
        loss.backward()


def test_a_mask_modified_after_the_forward_is_an_error(backend, device):
    layer, conv = trained_layer(3, 3, device), nn.Conv1d(3, 3, 1, device=device)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    with brn.recompute_activations():
        loss = conv(layer(normal(2, 3, 5, device=device).requires_grad_(), mask=mask)).sum()
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("what", ["input", "output", "parameter"])
def test_other_saved_tensors_are_watched_as_pytorch_does(device, what):
    def attempt():
        weight = normal(3, device=device).requires_grad_()
        x = normal(3, seed=1, device=device).requires_grad_() * 1
        y = (x * weight).exp()
        with torch.no_grad():
            {"input": x, "output": y, "parameter": weight}[what].add_(1)
        y.sum().backward()

    message = "one of the variables needed for gradient computation has been modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message):
        attempt()
    with pytest.raises(RuntimeError, match=message), brn.recompute_activations():
        attempt()


def test_a_step_of_the_optimizer_before_the_backward(backend, device):
    """What the consumer gets is of the parameters that the forward had; the layer's own backward refuses."""
    layer = trained_layer(3, 3, device, activation="relu")
    seen = []
    with brn.recompute_activations():
        y = layer(normal(2, 3, 5, device=device).requires_grad_())
        expected = y.detach().clone()
        loss = Keep.apply(y, seen).sum()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    layer(normal(2, 3, 5, seed=1, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(seen[0], expected)


def test_retained_graph(backend, device):
    layer, conv = trained_layer(3, 3, device, activation="silu"), nn.Conv1d(3, 3, 2, device=device)
    x = normal(2, 3, 5, device=device).requires_grad_()
    with brn.recompute_activations():
        loss = conv(layer(x)).square().sum()
    first = torch.autograd.grad(loss, [x, conv.weight], retain_graph=True)
    assert_equal(torch.autograd.grad(loss, [x, conv.weight]), first)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("inside", [False, True])
def test_second_derivatives(backend, device, inside):
    layer = trained_layer(3, 3, device, torch.float64, activation="silu")
    conv = nn.Conv1d(3, 3, 2, device=device).double()

    def derivatives(on):
        mine = copy.deepcopy(layer)
        x = normal(2, 3, 5, device=device, dtype=torch.float64).requires_grad_()

        def second(loss):
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
            return torch.autograd.grad(dx.square().sum(), [x, conv.weight, mine.weight])

        if not on:
            return second(conv(mine(x)).pow(3).sum())
        with brn.recompute_activations():
            loss = conv(mine(x)).pow(3).sum()
            if inside:
                return second(loss)
        return second(loss)

    expected = derivatives(False)
    assert all(d.abs().max() > 1e-3 for d in expected)
    assert_equal(derivatives(True), expected)
