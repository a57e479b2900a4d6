"""What trainings do around the layer: accumulated gradients, frozen parts, averages, copies, parametrized weights."""

import copy
import io
import pickle

import pytest
import torch
from oracle import Oracle
from tolerances import assert_close
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import brn_kernels as brn
from brn_kernels import backends, node

OPEN = brn.ClipSchedule.constant(1.3, 0.3)
RAMP = brn.ClipSchedule(r_max=1.3, d_max=0.3, hold=2, r_ramp=6, d_ramp=4)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def buffers_of(module):
    return {name: value.clone() for name, value in module.named_buffers()}


class Network(nn.Module):
    """Two convolutions and two of our layers, one of which activates and takes a residual."""

    def __init__(self, schedule=OPEN, dtype=torch.float32):
        torch.manual_seed(0)
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, dtype=dtype)
        self.norm = brn.BatchRenorm2d(4, momentum=0.1, schedule=schedule, dtype=dtype)
        self.second = nn.Conv2d(4, 4, 3, padding=1, dtype=dtype)
        self.join = brn.BatchRenorm2d(4, momentum=None, schedule=schedule, activation="relu", dtype=dtype)

    def forward(self, x):
        y = self.norm(self.first(x))
        return self.join(self.second(y), y)


def batch(seed, dtype=torch.float32):
    return normal(4, 2, 5, 4, seed=seed, dtype=dtype) * 2 + 1


def target(seed, dtype=torch.float32):
    return normal(4, 4, 5, 4, seed=1000 + seed, dtype=dtype)


# --- gradient accumulation


def test_accumulated_gradients_are_the_sum_and_statistics_move_with_every_micro_batch(backend, device):
    """Each micro-batch is a training step of the statistics and of the schedule, and of the weights a part of one."""
    ramp = {"r_max": 1.3, "d_max": 0.3, "hold": 1, "r_ramp": 4, "d_ramp": 2}
    layer = brn.BatchRenorm1d(3, momentum=0.1, schedule=brn.ClipSchedule(**ramp), device=device).double()
    oracle = Oracle(3, weight=torch.ones(3).double().requires_grad_(), momentum=0.1, **ramp)
    oracle.bias = torch.zeros(3).double().requires_grad_()
    for step in range(4):
        x, dy = normal(4, 3, 5, seed=step) * 2 + 1, normal(4, 3, 5, seed=100 + step)
        a, b = x.to(device, copy=True).requires_grad_(), x.clone().requires_grad_()
        layer(a).backward(dy.to(device))
        oracle(b).backward(dy)
        assert_close(a.grad.cpu(), b.grad, "dx", scale=10)
    assert layer.num_batches_tracked.item() == 4
    assert_close(layer.weight.grad.cpu(), oracle.weight.grad, "dweight", scale=100)
    assert_close(layer.bias.grad.cpu(), oracle.bias.grad, "dbias", scale=100)
    assert_close(layer.running_mean.cpu(), oracle.running_mean, "running_mean")
    assert_close(layer.running_var.cpu(), oracle.running_var, "running_var", scale=10)


def test_backwards_in_any_order_after_several_forwards(backend, device):
    """A backward needs nothing of the layer that a later forward changes."""
    x, dy = normal(3, 4, 3, 5).to(device), normal(3, 4, 3, 5, seed=1).to(device)
    gradients = []
    for order in ([], [2, 0, 1]):
        layer = brn.BatchRenorm1d(3, momentum=0.5, schedule=OPEN, activation="silu", device=device).double()
        leaves = [a.clone().requires_grad_() for a in x]
        outputs = []
        for i, leaf in enumerate(leaves):
            outputs.append(layer(leaf))
            if not order:
                outputs[i].backward(dy[i])
        for i in order:
            outputs[i].backward(dy[i])
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_training_step_between_an_evaluation_and_its_backward(backend, device, activation):
    """The gradient was silently of the moved statistics (an error with the reference backend)."""
    layer = brn.BatchRenorm1d(3, momentum=0.5, activation=activation, device=device).double()
    layer(normal(8, 3, seed=5).to(device) * 3 + 1)
    x, dy = normal(8, 3).to(device).requires_grad_(), normal(8, 3, seed=1).to(device)
    wanted = [x, layer.weight, layer.bias]
    expected = torch.autograd.grad(layer.eval()(x), wanted, dy)
    y = layer(x)
    layer.train()(normal(8, 3, seed=2).to(device) * 10)
    for ours, before in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
        assert torch.equal(ours, before)


# --- frozen parts


def test_layers_in_evaluation_stay_while_the_others_train(backend, device):
    model = Network(dtype=torch.float64).to(device)
    model(batch(0, torch.float64).to(device))
    model.norm.eval()
    peer = copy.deepcopy(model)
    peer.norm = brn.revert_to_batchnorm(peer.norm)
    frozen, moving = buffers_of(model.norm), buffers_of(model.join)
    for step in range(1, 3):
        x, dy = batch(step, torch.float64).to(device), target(step, torch.float64).to(device)
        model(x).backward(dy)
        peer(x).backward(dy)
    for name, value in model.norm.named_buffers():
        assert torch.equal(value, frozen[name]), name
    assert model.join.num_batches_tracked.item() == 3
    assert not torch.equal(model.join.running_mean, moving["running_mean"])
    for (name, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.fixture
def work(backend, device, monkeypatch):
    """What the backend is asked for: one (needs_dx, needs_dresidual) for each backward."""
    module, asked = backends.resolve(backend, device.type), []
    backward = module.backward

    def recording(*arguments):
        asked.append(arguments[9:11])
        return backward(*arguments)

    monkeypatch.setattr(module, "backward", recording)
    monkeypatch.setattr(node, "module", lambda: None)  # of backwards in C++, test_node.py looks at each launch
    return asked


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(
    "trained, expected",
    [
        ({"x", "residual", "weight", "bias"}, (True, True)),
        ({"x", "weight", "bias"}, (True, False)),
        ({"x"}, (True, False)),
        ({"weight", "bias"}, (False, False)),
        ({"bias"}, (False, False)),
        ({"residual"}, (False, True)),
        (set(), None),
    ],
    ids=lambda value: "+".join(sorted(value)) or "nothing" if isinstance(value, set) else "",
)
def test_the_backend_computes_only_what_is_trained(work, device, activation, trained, expected):
    layer = brn.BatchRenorm1d(3, activation=activation, schedule=OPEN, device=device).double()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    x, residual = normal(4, 3, 5).to(device), normal(4, 3, 5, seed=1).to(device)
    y = layer(x.requires_grad_("x" in trained), residual.requires_grad_("residual" in trained))
    assert layer.num_batches_tracked.item() == 1, "frozen parameters do not stop the statistics: eval() does"
    if expected is None:
        assert not y.requires_grad and not work
        return
    y.backward(normal(4, 3, 5, seed=2).to(device))
    if activation is None:  # then dresidual is dy
        expected = (expected[0], False)
    assert work == [expected]


def test_an_input_without_gradient_leaves_the_others_as_they_are(backend, device):
    gradients = []
    for frozen in (False, True):
        model = Network(dtype=torch.float64).to(device)
        model.first.requires_grad_(not frozen)
        model.norm.requires_grad_(not frozen)
        model(batch(0, torch.float64).to(device)).backward(target(0, torch.float64).to(device))
        gradients.append([model.second.weight.grad, model.join.weight.grad, model.join.bias.grad])
        assert (model.norm.weight.grad is None) == (model.first.weight.grad is None) == frozen
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- averaged weights


def steps_of(model, optimizer, steps, device, start=0):
    outputs = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        outputs.append(model(batch(step).to(device)))
        (outputs[-1] - target(step).to(device)).square().mean().backward()
        optimizer.step()
    return outputs


@pytest.mark.many_steps
@pytest.mark.parametrize("average", ["SWA", "EMA"])
def test_averaged_weights_with_statistics_of_the_data(backend, device, average):
    """Weights are the average; statistics, after update_stats, those of the averaged network over the data."""
    model = Network().to(device)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7) if average == "EMA" else None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = None
    for step in range(4):
        steps_of(model, optimizer, 1, device, start=step)
        averaged.update_parameters(model)
        current = model.join.weight.detach().clone()
        weight = 0.3 if average == "EMA" else 1 / (step + 1)
        expected = current if expected is None else expected + weight * (current - expected)
    data = [batch(10 + i).to(device) for i in range(3)]
    brn.update_stats(averaged, data)
    assert torch.allclose(averaged.module.join.weight, expected, atol=1e-6)
    assert averaged.module.norm.num_batches_tracked.item() == 4, "the schedule goes on where it was"
    hidden = torch.stack([averaged.module.first(x) for x in data])
    assert torch.allclose(averaged.module.norm.running_mean, hidden.mean((0, 1, 3, 4)), atol=1e-5)
    unbiased = hidden.var((1, 3, 4)).mean(0)
    assert torch.allclose(averaged.module.norm.running_var, unbiased, rtol=1e-4)
    assert not torch.equal(averaged.module.norm.running_mean, model.norm.running_mean)


def average_of_floats(averaged, current, count):
    return averaged + (current - averaged) / (count + 1) if averaged.is_floating_point() else current


@pytest.mark.many_steps
def test_average_of_buffers_that_takes_the_newest_of_those_without_a_fraction(backend, device):
    """PyTorch's own average fails on bools and leaves num_batches_tracked at 1."""
    model = Network(RAMP).to(device)
    averaged = AveragedModel(model, avg_fn=average_of_floats, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    means = []
    for step in range(3):
        steps_of(model, optimizer, 1, device, start=step)
        averaged.update_parameters(model)
        means.append(model.norm.running_mean.clone())
    assert torch.allclose(averaged.module.norm.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert averaged.module.norm.num_batches_tracked.item() == 3
    assert torch.equal(averaged.module.norm.clipped, model.norm.clipped)
    torchs = AveragedModel(model, use_buffers=True)
    torchs.update_parameters(model)
    with pytest.raises(RuntimeError, match="bool|Integer"):  # once this passes, the function above can go
        torchs.update_parameters(model)


# --- copies in mid-training


def copies(kind, model, optimizer):
    """The model and its optimizer, once more."""
    if kind == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if kind == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    file = io.BytesIO()
    if kind == "torch.save of the module":
        torch.save((model, optimizer), file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = Network(RAMP).to(next(model.parameters()).device)
    other_optimizer = torch.optim.SGD(other.parameters(), 1.0, momentum=0.5)
    other.load_state_dict(state["model"]), other_optimizer.load_state_dict(state["optimizer"])
    return other, other_optimizer


@pytest.mark.many_steps
@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save of the module", "state_dict"])
def test_a_copy_in_mid_training_goes_on_alike(backend, device, kind):
    model = Network(RAMP).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    steps_of(model, optimizer, 4, device)
    other, other_optimizer = copies(kind, model, optimizer)
    expected = steps_of(model, optimizer, 6, device, start=4)
    found = steps_of(other, other_optimizer, 6, device, start=4)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.norm.running_mean.data_ptr() != model.norm.running_mean.data_ptr()


# --- parametrized weights


class Exponential(nn.Module):
    def forward(self, w):
        return w.exp()

    def right_inverse(self, w):
        return w.log()


def parametrized(kind, layer):
    if kind == "exponential":
        parametrize.register_parametrization(layer, "weight", Exponential())
    else:
        parametrizations.weight_norm(layer, "weight", dim=None)
    return layer


@pytest.mark.parametrize("kind", ["exponential", "weight_norm"])
def test_parametrized_weight_trains(backend, device, kind):
    """Its gradient is the plain weight's, through the parametrization."""
    plain = brn.BatchRenorm1d(3, schedule=OPEN, activation="silu").double().to(device)
    nn.init.uniform_(plain.weight, 0.5, 2.0)
    layer = parametrized(kind, copy.deepcopy(plain))
    originals = [p for name, p in layer.named_parameters() if name.startswith("parametrizations")]
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for step in range(3):
        x, dy = normal(4, 3, 5, seed=step).to(device), normal(4, 3, 5, seed=100 + step).to(device)
        plain.weight.data.copy_(layer.weight.detach())
        plain.bias.data.copy_(layer.bias.detach())
        layer.zero_grad(), plain.zero_grad()
        layer(x).backward(dy)
        plain(x).backward(dy)
        through = torch.autograd.grad(layer.weight, originals, plain.weight.grad)
        for original, expected in zip(originals, through, strict=True):
            assert_close(original.grad, expected, scale=10)
        assert_close(layer.bias.grad, plain.bias.grad, scale=10)
        optimizer.step()
    assert torch.equal(layer.running_var, plain.running_var) and layer.num_batches_tracked.item() == 3
    assert not torch.equal(layer.weight.detach(), plain.weight.detach())
    with pytest.warns(UserWarning, match="left as it is"):
        assert brn.revert_to_batchnorm(layer) is layer
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is brn.BatchRenorm1d and layer.eval()(x).isfinite().all()
