"""``recompute_activations`` with checkpointing, other hooks, autocast, compiled code, transforms, threads."""

import copy
import threading

import pytest
import torch
from recompute_tools import (
    LAYOUTS,
    Keep,
    Net,
    Total,
    assert_equal,
    assert_same_bits,
    is_freed,
    normal,
    run,
    trained_layer,
)
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn
from bench.saved_bytes import SavedBytes
from brn_kernels import checkpointing, recompute

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


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
