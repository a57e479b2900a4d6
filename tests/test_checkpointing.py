"""Activation checkpointing runs a forward twice: statistics move once, gradients are the plain run's."""

import copy
import gc
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import brn_kernels as brn
from brn_kernels import checkpointing

pytestmark = pytest.mark.many_steps

MODES = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])


class Block(torch.nn.Module):
    """Limits that really clip, so that other statistics mean other outputs."""

    def __init__(self, channels=4, schedule=None):
        super().__init__()
        schedule = schedule or brn.ClipSchedule.constant(1.2, 0.2)
        self.conv1 = torch.nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = brn.BatchRenorm1d(channels, momentum=0.3, schedule=schedule, activation="relu")
        self.conv2 = torch.nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = brn.BatchRenorm1d(channels, momentum=0.3, schedule=brn.ClipSchedule.unclipped())
        self.double()

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=x)


def batches(count, device):
    generator = torch.Generator().manual_seed(0)
    make = [torch.randn(4, 4, 6, generator=generator, dtype=torch.float64) * (1 + k) + k for k in range(count)]
    return [x.to(device).requires_grad_() for x in make]


def compare(model, plain_forward, checkpointed_forward, xs, backward_order="together", steps=2):
    """Train two copies of the model, one checkpointed; everything about them must agree."""
    plain, checkpointed = model, copy.deepcopy(model)
    results = []
    for run, forward in ((plain, plain_forward), (checkpointed, checkpointed_forward)):
        inputs = [x.detach().clone().requires_grad_() for x in xs]
        for _ in range(steps):
            weights = torch.linspace(-1, 1, inputs[0].numel(), device=inputs[0].device).view_as(inputs[0])
            losses = [(forward(run, x).sin() * weights).sum() for x in inputs]
            if backward_order == "together":
                sum(losses).backward()
            else:
                for loss in losses if backward_order == "first in, first out" else reversed(losses):
                    loss.backward()
        results.append([x.grad for x in inputs])
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert p.grad.abs().max() > 1e-3, name
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-12), name
    for p, q in zip(*results, strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)
    for (name, p), q in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(p, q), name
    return checkpointed


@MODES
@pytest.mark.parametrize("order", ["together", "first in, first out", "last in, first out"])
@pytest.mark.parametrize("count", [1, 3])
def test_several_forwards_before_their_backwards(backend, device, use_reentrant, order, count):
    model = Block().to(device)
    after = compare(
        model, lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant), batches(count, device),
        order,
    )  # fmt: skip
    assert after.norm1.num_batches_tracked == 2 * count


@MODES
def test_the_same_batch_twice(backend, device, use_reentrant):
    """Calls that nothing in their input tells apart."""
    x = batches(1, device)[0]
    compare(
        Block().to(device), lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant), [x, x, x]
    )


def nested(m, x, use_reentrant):
    def inner(h):
        return checkpoint(m.norm1, m.conv1(h), use_reentrant=use_reentrant)

    def outer(h):
        h2 = checkpoint(inner, h, use_reentrant=use_reentrant)
        return m.norm2(m.conv2(h2), residual=h)

    return checkpoint(outer, x, use_reentrant=use_reentrant)


@MODES
def test_nested(backend, device, use_reentrant):
    compare(
        Block().to(device), lambda m, x: m(x), lambda m, x: nested(m, x, use_reentrant), batches(2, device)
    )  # fmt: skip


@MODES
@pytest.mark.parametrize("nodes_before", [0, 10_000])
def test_nested_with_a_backward_in_a_thread_that_numbers_nodes_for_itself(backend, device, use_reentrant, nodes_before):
    """As on a GPU, where the first real run gave wrong gradients."""

    def run(m, x):
        return nested(m, x, use_reentrant)

    in_a_thread = torch.Tensor.backward

    def backward(loss):
        one = torch.ones((), requires_grad=True)

        def work():
            for _ in range(nodes_before):
                one * 2  # noqa: B018
            in_a_thread(loss)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        after = compare(Block().to(device), lambda m, x: m(x), run, batches(2, device), "first in, first out")
    assert all(set(log.under_no_grad) <= {-1} for log in checkpointing._logs.values()), "nothing stays behind"
    assert after.norm1.num_batches_tracked == 4


@MODES
def test_a_layer_shared_within_a_region(backend, device, use_reentrant):
    def twice(m, x):
        return m(m(m(x) * 2))

    compare(
        Block().to(device), twice, lambda m, x: checkpoint(lambda h: twice(m, h), x, use_reentrant=use_reentrant),
        batches(2, device),
    )  # fmt: skip


@MODES
def test_a_layer_shared_between_regions(backend, device, use_reentrant):
    def regions(m, x):
        for _ in range(3):
            x = checkpoint(m, x, use_reentrant=use_reentrant)
        return x

    compare(Block().to(device), lambda m, x: m(m(m(x))), regions, batches(2, device))


@MODES
def test_checkpoint_sequential(backend, device, use_reentrant):
    model = torch.nn.Sequential(Block(), Block(), Block()).to(device)
    run = lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=use_reentrant)  # noqa: E731
    compare(model, lambda m, x: m(x), run, batches(2, device))


@MODES
def test_a_layer_in_evaluation(backend, device, use_reentrant):
    model = Block().to(device)
    model.norm1.eval()
    compare(model, lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant), batches(2, device))


def test_graph_kept_for_a_second_backward(backend, device):
    model = Block().to(device)
    x = batches(1, device)[0]
    y = checkpoint(model, x, use_reentrant=False)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    before = copy.deepcopy(dict(model.named_buffers()))
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], first)
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


@MODES
def test_the_function(backend, device, use_reentrant):
    x = batches(1, device)[0]
    grads, states = [], []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        mean = torch.zeros(4, dtype=x.dtype, device=device)
        var = torch.ones(4, dtype=x.dtype, device=device)
        y = run(lambda h: brn.batch_renorm(h * 2, mean, var, training=True, r_max=1.1, d_max=0.1), x)  # noqa: B023
        x.grad = None
        y.backward(x.detach())
        grads.append(x.grad)
        states.append((mean, var))
    assert torch.allclose(*grads, rtol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(*states, strict=True))


def test_nothing_is_kept_once_the_graph_is_gone(device):
    layer = brn.BatchRenorm1d(4, device=device).double()
    y = checkpoint(layer, batches(1, device)[0], use_reentrant=False)
    assert len(checkpointing._logs[layer.running_mean].under_hooks) == 1
    y.backward(y.detach())
    del y
    gc.collect()
    assert len(checkpointing._logs[layer.running_mean].under_hooks) == 0
    logs = len(checkpointing._logs)
    del layer
    gc.collect()
    assert len(checkpointing._logs) < logs


def test_plain_training_keeps_no_copies(device):
    layer = brn.BatchRenorm1d(4, device=device).double()
    x = batches(1, device)[0]
    layer(x).backward(x.detach())
    assert layer.running_mean not in checkpointing._logs


def test_training_without_gradients_updates_and_keeps_few_copies(backend, device):
    layer = brn.BatchRenorm1d(4, device=device).double()
    with torch.no_grad():
        for _ in range(100):
            layer(batches(1, device)[0])
    assert layer.num_batches_tracked == 100
    assert len(checkpointing._logs[layer.running_mean].under_no_grad) <= 64


def test_more_calls_than_are_kept_raise_instead_of_giving_wrong_gradients(device, monkeypatch):
    monkeypatch.setattr(checkpointing, "_NO_GRAD_CALLS_KEPT", 4)
    layer = brn.BatchRenorm1d(3, schedule=brn.ClipSchedule.constant(3, 5), momentum=0.1, device=device)
    z = torch.zeros(8, 3, device=device, requires_grad=True)
    xs = torch.randn(6, 8, 3, device=device)
    y = checkpoint(lambda z: sum(layer(x + z).square().sum() for x in xs), z, use_reentrant=True)
    with pytest.raises(RuntimeError, match="no longer kept: at most"):
        y.backward()


def test_hooks_that_outlive_their_graphs_do_not_gather_copies(device, monkeypatch):
    monkeypatch.setattr(checkpointing, "_HOOKED_CALLS_KEPT", 5)
    layer = brn.BatchRenorm1d(3, device=device)
    hooks = torch.autograd.graph.save_on_cpu()
    for _ in range(20):
        with hooks:
            y = layer(torch.randn(8, 3, device=device, requires_grad=True))
        y.sum().backward()
    kept = checkpointing._logs[layer.running_mean].under_hooks.values()
    assert sum(map(len, kept)) == 5


def test_hooks_that_cannot_be_referred_to_weakly(device):
    layer = brn.BatchRenorm1d(3, device=device)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.clone):
        y = layer(torch.randn(8, 3, device=device, requires_grad=True))
    y.sum().backward()
    assert layer.num_batches_tracked.item() == 1


def test_a_nested_backward_that_raised_is_forgotten(device):
    """Else later backwards would look among its calls."""
    plain = Block().to(device)
    checkpointed = copy.deepcopy(plain)
    x = batches(1, device)[0].detach()

    def interrupted(m, x, raising):
        def inner(h):
            return checkpoint(m.norm1, m.conv1(h), use_reentrant=True)

        def outer(h):
            h = checkpoint(inner, h, use_reentrant=True)
            if raising and h.requires_grad:
                h.register_hook(lambda _: (_ for _ in ()).throw(ArithmeticError("in the backward")))
            return m.norm2(m.conv2(h))

        return checkpoint(outer, x, use_reentrant=True)

    with pytest.raises(ArithmeticError):
        interrupted(checkpointed, x.clone().requires_grad_(), True).sin().sum().backward()
    plain.norm2(plain.conv2(plain.norm1(plain.conv1(x))))
    for p in checkpointed.parameters():
        p.grad = None
    for _ in range(2):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain.norm2(plain.conv2(plain.norm1(plain.conv1(a)))).sin().sum().backward()
        interrupted(checkpointed, b, False).sin().sum().backward()
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    for (name, p), q in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.allclose(p.grad, q[1].grad, rtol=1e-10, atol=1e-12), name
