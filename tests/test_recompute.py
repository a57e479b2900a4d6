"""``recompute_activations``: less is kept, the same bits come back, and nothing wrong goes unnoticed."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from fused_networks import NETWORKS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ACTIVATIONS
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn
from bench.saved_bytes import SavedBytes
from brn_kernels import checkpointing, recompute

LAYERS = {2: brn.BatchRenorm1d, 3: brn.BatchRenorm1d, 4: brn.BatchRenorm2d, 5: brn.BatchRenorm3d}
SCHEDULES = {
    "unclipped": brn.ClipSchedule.unclipped(),
    "some clipped": brn.ClipSchedule.constant(1.5, 0.5),
    "all clipped": brn.ClipSchedule.constant(1.0001, 0.0001),
    "closed": brn.ClipSchedule.batchnorm(),
}


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(x):
    return torch.stack([x, x], -1)[..., 0]


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last, "strided": every_other}


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test leaves hooks, nor registered outputs once its graphs are gone."""
    yield
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    gc.collect()
    assert not recompute._outputs


class Keep(torch.autograd.Function):
    """Passes x on and saves it; its backward says what it got back."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.save_for_backward(x)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.seen.append(ctx.saved_tensors[0])
        return dy, None


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        return Keep.apply(x, self.seen)


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def bits_of(x):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(kind)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
    assert torch.equal(bits_of(actual), bits_of(expected))


def interpreted(backend, device):
    return backend == "triton" and device.type == "cpu"


def is_freed(storage):
    """At once; Triton's interpreter leaves cycles behind."""
    if brn.backends.selected() == "triton" and not torch.cuda.is_available():
        gc.collect()
    return storage.expired()


def comes_back(layer, x, mask=None):
    """The layer's output and what its consumer gets of it in the backward; nothing of it may be kept in between."""
    seen = []
    with SavedBytes() as kept, brn.recompute_activations():
        y = layer(x) if mask is None else layer(x, mask=mask)
        expected = y.detach().clone(memory_format=torch.preserve_format)
        storage = recompute.StorageWeakRef(y.untyped_storage())
        loss = Keep.apply(y, seen).float().square().sum()
        del y
    assert is_freed(storage) and kept.bytes > 0
    loss.backward()
    return expected, seen[0]


def trained_layer(dims, channels, device, dtype=torch.float32, clipped="some clipped", **arguments):
    layer = LAYERS[dims](channels, schedule=SCHEDULES[clipped], device=device, **{"momentum": 0.1, **arguments})
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.copy_(1 + 0.3 * normal(channels, seed=1))
        if layer.bias is not None:
            layer.bias.copy_(normal(channels, seed=2))
    return layer.double() if dtype == torch.float64 else layer


def spread(x):
    """Channels of different means and variances, so that some clip and some do not."""
    view = [1, -1] + [1] * (x.dim() - 2)
    ramp = torch.linspace(0, 1, x.shape[1], dtype=torch.float64, device=x.device).view(view)
    return (x * (1 + ramp) + ramp).to(x.dtype)


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


class Net(nn.Module):
    """A convolution behind every kind of output: of a layer, with a residual, evaluated, viewed, sliced, joined."""

    def __init__(self, channels=6, activation="silu"):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(5)])
        self.norms = nn.ModuleList(
            [brn.BatchRenorm2d(channels, activation=activation, schedule=SCHEDULES["some clipped"]) for _ in range(5)]
        )
        self.norms[3].eval()
        self.join = nn.Conv2d(2 * channels, channels, 1)
        self.head = nn.Linear(channels * 4, 3)

    def forward(self, x):
        h1 = self.norms[0](self.convs[0](x))
        h2 = self.norms[1](self.norms[2](self.convs[1](h1)))  # one layer's output is the next one's input
        h3 = self.norms[3](self.convs[2](h2), residual=h1)
        h4 = self.norms[4](self.convs[3](h3), residual=h3)
        h5 = self.convs[4](h4[:, :, ::2, 1:]).mean((2, 3)).sum() + (h2 * h2.transpose(2, 3)).mean()
        h6 = self.join(torch.cat([h1, nn.functional.interpolate(h4, scale_factor=1.0) * 2], 1))
        return self.head(nn.functional.adaptive_max_pool2d(h6, 2).flatten(1)).square().mean() + h5


def run(model, x, *, on, steps=2, backward_inside=False, layout=torch.contiguous_format):
    model, x = copy.deepcopy(model), x.clone(memory_format=layout).requires_grad_()
    for _ in range(steps):
        if on and not backward_inside:
            with brn.recompute_activations():
                loss = model(x)
            loss.backward()
        elif on:
            with brn.recompute_activations():
                model(x).backward()
        else:
            model(x).backward()
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_is_the_same_to_the_bit(backend, device, inside, layout):
    torch.manual_seed(0)
    model, x = Net().to(device=device, memory_format=layout), normal(3, 6, 8, 8, device=device)
    expected = run(model, x, on=False, layout=layout)
    assert_equal(run(model, x, on=True, backward_inside=inside, layout=layout), expected)


BYTES = {"resnet50": 0.85, "resnet18": 0.77, "efficientnet_b0": 0.6, "unet": 0.6}


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


@pytest.mark.parametrize("name", ["resnet18", "unet"])
def test_networks_train_the_same(device, name):
    torch.manual_seed(0)
    model = NETWORKS[name](True).to(device)
    loss = nn.Sequential(model, nn.Softmax(1), nn.Flatten())
    expected = run(nn.Sequential(loss, Total()), normal(2, 3, 64, 64, device=device), on=False)
    assert_equal(run(nn.Sequential(loss, Total()), normal(2, 3, 64, 64, device=device), on=True), expected)


class Total(nn.Module):
    def forward(self, x):
        return x.square().sum()


# What may be kept, and for how long


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


# Views and joined outputs


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


# Modifications in place


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


# Other ways to run a backward


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


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("where", ["region in context", "context in region"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.many_steps
def test_checkpointing(backend, device, use_reentrant, where, inside):
    torch.manual_seed(0)
    model, x = Net().to(device), normal(3, 6, 8, 8, device=device)
    expected = run(model, x, on=False)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            region = self.model if where == "region in context" else brn.recompute_activations()(self.model.forward)
            return checkpoint(region, x, use_reentrant=use_reentrant)

    got = run(Checkpointed(), x, on=where == "region in context", backward_inside=inside)
    assert_equal(got, expected)


@pytest.mark.many_steps
def test_checkpointed_blocks_between_others(backend, device):
    torch.manual_seed(0)

    class Blocks(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv1d(3, 3, 3, padding=1) for _ in range(4)])
            self.norms = nn.ModuleList([trained_layer(3, 3, "cpu", activation="relu") for _ in range(4)])
            self.checkpointed = checkpointed

        def forward(self, x):
            for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
                if self.checkpointed and k in (1, 2):
                    x = checkpoint(lambda x, c=conv, n=norm: n(c(x)), x, use_reentrant=k == 1)
                else:
                    x = norm(conv(x))
            return x.square().sum()

    model = Blocks(True).to(device)
    expected = run(model, normal(2, 3, 5, device=device), on=False)
    assert_equal(run(model, normal(2, 3, 5, device=device), on=True), expected)


def test_save_on_cpu_around_gets_what_is_kept(backend, device):
    layer = trained_layer(4, 3, device, activation="silu")
    for layout in LAYOUTS.values():
        x = layout(normal(2, 3, 5, 5, device=device)).requires_grad_()
        seen = []
        with save_on_cpu(), brn.recompute_activations():
            y = layer(x)
            expected = y.detach().clone(memory_format=torch.preserve_format)
            loss = Keep.apply(y, seen).sum()
        loss.backward()
        assert_same_bits(seen[0], expected)


def test_hooks_around_that_forget_strides(backend, device):
    layer = trained_layer(4, 3, device, activation="silu")
    forget = lambda t: t.detach().clone(memory_format=torch.contiguous_format)  # noqa: E731
    for layout in LAYOUTS.values():
        seen = []
        with saved_tensors_hooks(forget, lambda t: t), brn.recompute_activations():
            y = layer(layout(normal(2, 3, 5, 5, device=device)).requires_grad_())
            expected = y.detach().clone(memory_format=torch.preserve_format)
            loss = Keep.apply(y, seen).sum()
        loss.backward()
        assert_same_bits(seen[0], expected)


def test_statistics_are_not_copied_as_for_checkpointing(device):
    layer = trained_layer(3, 3, device)
    with brn.recompute_activations():
        layer(normal(2, 3, 5, device=device).requires_grad_()).sum().backward()
    assert layer.running_mean not in checkpointing._logs


def test_hooks_around_get_each_kept_tensor_once_and_no_output(backend, device):
    layer, conv = trained_layer(3, 3, device), nn.Conv1d(3, 3, 1, device=device)
    packed, unpacked = [], []
    x = normal(2, 3, 5, device=device).requires_grad_()
    with saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: unpacked.append(t.shape) or t):
        with brn.recompute_activations():
            loss = conv(layer(x)).sum()
    assert packed.count(x.shape) == 1
    loss.backward()
    assert unpacked.count(x.shape) == 2  # for the convolution, and for the layer


def test_hooks_inside_hide_the_layers(device):
    layer, conv = trained_layer(3, 3, device), nn.Conv1d(3, 3, 1, device=device)
    packed = []
    with brn.recompute_activations(), saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        conv(layer(normal(2, 3, 5, device=device).requires_grad_())).sum().backward()
    assert packed.count((2, 3, 5)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.many_steps
def test_autocast(backend, device, dtype):
    torch.manual_seed(0)

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), trained_layer(4, 3, "cpu", activation="silu")
            self.last = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            with torch.autocast(x.device.type, dtype):
                return self.last(self.norm(self.conv(x))).float().square().sum()

    model, x = Cast().to(device), normal(2, 3, 4, 4, device=device)
    expected = run(model, x, on=False)
    assert_equal(run(model, x, on=True), expected)
    with SavedBytes(model) as plain:
        loss = model(x)
    with SavedBytes(model) as less, brn.recompute_activations():
        other = model(x)
    assert plain.shapes.count((2, 3, 4, 4)) == less.shapes.count((2, 3, 4, 4)) + 1
    (loss + other).backward()


@pytest.mark.many_steps
def test_compiled_models_are_left_alone(device):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 3, 1), trained_layer(4, 3, "cpu", activation="relu"), nn.Conv2d(3, 3, 1), Total()
    )
    model, x = layers.to(device), normal(2, 3, 4, 4, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = run(model, x, on=False)
    for inside in (False, True):
        torch._dynamo.reset()
        mine, y = copy.deepcopy(model), x.clone().requires_grad_()
        compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            with brn.recompute_activations():
                loss = compiled(y)
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        got = [y.grad, *(p.grad for p in mine.parameters()), *mine.buffers()]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.many_steps
def test_the_context_inside_compiled_code_does_nothing(device):
    layer = trained_layer(3, 3, device)

    @torch.compile(backend="aot_eager")
    def step(x):
        with brn.recompute_activations():
            return layer(x).square().sum()

    step(normal(2, 3, 5, device=device).requires_grad_()).backward()
    assert layer.weight.grad is not None


def test_evaluation_and_no_grad_are_left_alone(backend, device):
    layer = trained_layer(3, 3, device)
    x = normal(2, 3, 5, device=device)
    with brn.recompute_activations():
        with torch.no_grad():
            y = layer(x)
        assert not recompute._outputs and not y.requires_grad
        z = layer.eval()(x.clone().requires_grad_())
        assert not recompute._outputs
    z.sum().backward()


def test_function_transforms(device):
    """PyTorch refuses hooks under ``grad``; ``vmap`` has none of its own."""
    layer = trained_layer(3, 3, device).eval()
    x = normal(2, 3, 5, device=device)
    with brn.recompute_activations():
        with pytest.raises(RuntimeError, match="saved tensor hooks"):
            torch.func.grad(lambda x: layer(x).sum())(x)
        y = torch.func.vmap(lambda x: layer(x))(x.unsqueeze(0).clone().requires_grad_())
    y.sum().backward()
    assert torch.allclose(y[0], layer(x))


def test_forward_mode(device):
    layer = trained_layer(3, 3, device)
    with brn.recompute_activations(), torch.autograd.forward_ad.dual_level():
        x = normal(2, 3, 5, device=device)
        y = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None


# Contexts


def test_nested_and_as_a_decorator(backend, device):
    layer, conv = trained_layer(3, 3, device, activation="relu"), nn.Conv1d(3, 3, 1, device=device)
    x = normal(2, 3, 5, device=device).requires_grad_()

    @brn.recompute_activations()
    def forward(x):
        with brn.recompute_activations():
            y = layer(x)
        return conv(y).sum()

    context = brn.recompute_activations()
    with SavedBytes(nn.ModuleList([layer, conv])) as kept, context, context:
        loss = forward(x)
    assert kept.shapes.count((2, 3, 5)) == 1
    loss.backward()


def test_an_output_saved_in_a_later_context(backend, device):
    layer, conv = trained_layer(3, 3, device), nn.Conv1d(3, 3, 1, device=device)
    seen = []
    with brn.recompute_activations():
        y = layer(normal(2, 3, 5, device=device).requires_grad_())
    expected = y.detach().clone()
    storage = recompute.StorageWeakRef(y.untyped_storage())
    kept = conv(y).sum()
    kept.backward(retain_graph=True)  # outside: kept as usual
    del kept
    with brn.recompute_activations():
        loss = Keep.apply(y, seen).sum()
    del y
    assert is_freed(storage)
    loss.backward()
    assert torch.equal(seen[0], expected)


def test_an_exception_leaves_nothing_behind(device):
    layer = trained_layer(3, 3, device)
    with pytest.raises(ValueError, match="expected shape"), brn.recompute_activations():
        y = layer(normal(2, 3, 5, device=device).requires_grad_())
        layer(normal(2, 4, 5, device=device).requires_grad_())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    y.sum().backward()
    packed = []
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        layer(normal(2, 3, 5, device=device).requires_grad_()).exp()
    assert len(packed) > 1


def test_threads_have_their_own(device):
    layer, conv = trained_layer(3, 3, device), nn.Conv1d(3, 3, 1, device=device)
    ready, results = threading.Barrier(2, timeout=60), {}

    def work(on):
        x = normal(2, 3, 5, device=device).requires_grad_()
        mine = copy.deepcopy(layer)
        for _ in range(20):
            ready.wait()
            if on:
                with brn.recompute_activations():
                    ready.wait()
                    loss = conv(mine(x)).square().sum()
            else:
                ready.wait()
                assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
                loss = conv(mine(x)).square().sum()
            (dx,) = torch.autograd.grad(loss, x)
        results[on] = dx

    threads = [threading.Thread(target=work, args=(on,)) for on in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[True], results[False])
