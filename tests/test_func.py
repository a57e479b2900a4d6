"""torch.func: functional calls, ensembles, derivatives of every kind. r and d are constants in all of them."""

import copy

import pytest
import torch
from oracle import Oracle
from tolerances import assert_close
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import brn_kernels as brn

OPEN = brn.ClipSchedule.constant(1.3, 0.3)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_of(activation=None, seed=0):
    layer = brn.BatchRenorm1d(3, schedule=OPEN, momentum=0.1, activation=activation).double()
    with torch.no_grad():
        layer.weight.copy_(normal(3, seed=seed + 100))
        layer.bias.copy_(normal(3, seed=seed + 200))
    with brn.use_backend("reference"):
        layer(normal(6, 3, 4, seed=seed + 300) * 2 + 1)  # statistics that are not 0 and 1
    return layer


def oracle_of(layer):
    oracle = Oracle(3, momentum=0.1, activation=layer.activation, r_max=1.3, d_max=0.3)
    oracle.weight, oracle.bias = layer.weight.detach(), layer.bias.detach()
    oracle.running_mean, oracle.running_var = layer.running_mean.clone(), layer.running_var.clone()
    return oracle


def parameters_of(model):
    return {name: value.detach() for name, value in model.named_parameters()}


def buffers_of(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def assert_same(before, after):
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_functional_call_updates_the_statistics_it_is_given(backend, device):
    layer = layer_of("relu").to(device)
    peer, module_before = copy.deepcopy(layer), buffers_of(layer)
    parameters, buffers = parameters_of(layer), buffers_of(layer)
    x, dy = normal(4, 3, 5, seed=1).to(device), normal(4, 3, 5, seed=2).to(device)
    parameters["weight"].mul_(2).requires_grad_()
    peer.weight.data.mul_(2)
    y, expected = functional_call(layer, (parameters, buffers), (x,)), peer(x)
    assert torch.equal(y, expected)
    assert_same(buffers_of(peer), buffers)
    assert_same(module_before, buffers_of(layer))
    y.backward(dy), expected.backward(dy)
    assert torch.equal(parameters["weight"].grad, peer.weight.grad) and layer.weight.grad is None


def ensemble_of(members, training):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 3), layer_of("silu", seed=i)).double() for i in range(members)]
    return [model.train(training) for model in models]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("inputs", ["one batch", "a batch each"])
def test_vmap_of_an_ensemble_is_each_model_alone(device, training, inputs):
    models = [model.to(device) for model in ensemble_of(3, training)]
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    each = inputs == "a batch each"
    x = normal(*([3] if each else []), 8, 4, seed=1).to(device)
    call = vmap(lambda p, b, x: functional_call(skeleton, (p, b), (x,)), (0, 0, 0 if each else None))
    y = call(parameters, buffers, x)
    for i, model in enumerate(models):
        assert_close(y[i], model(x[i] if each else x).detach())
        for name, value in model.named_buffers():
            assert_close(buffers[name][i].double(), value.double(), name)
        assert model[1].num_batches_tracked.item() == 1 + training


def test_vmap_of_gradients_with_residual_and_mask(backend, device):
    """Batches of an ensemble in one call, against the backend's own gradients one by one."""
    layers = [layer_of("relu", seed=i).to(device) for i in range(3)]
    parameters, buffers = stack_module_state(layers)
    x, residual, dy = (normal(3, 4, 3, 5, seed=i).to(device) for i in (1, 2, 3))
    mask = (torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(4)) < 0.7).to(device)

    def loss(p, b, x, residual, mask, dy):
        return (functional_call(layers[0], (p, b), (x, residual, mask)) * dy).sum()

    found = vmap(grad(loss, argnums=(0, 2, 3)))(parameters, buffers, x, residual, mask, dy)
    for i, layer in enumerate(layers):
        a, b = x[i].clone().requires_grad_(), residual[i].clone().requires_grad_()
        layer(a, b, mask[i]).backward(dy[i])
        assert_close(found[0]["weight"][i], layer.weight.grad, scale=20)
        assert_close(found[0]["bias"][i], layer.bias.grad, scale=20)
        assert_close(found[1][i], a.grad, scale=10)
        assert_close(found[2][i], b.grad, scale=10)
        assert_close(buffers["running_var"][i], layer.running_var)


def vjp_rows(function, x):
    y, back = vjp(function, x)
    return vmap(lambda v: back(v)[0])(torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)).view(*y.shape, *x.shape)


def jvp_columns(function, x):
    basis = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    columns = torch.stack([jvp(function, (x,), (tangent,))[1] for tangent in basis], -1)
    return columns.view(*columns.shape[:-1], *x.shape)


def with_own_statistics(layer):
    """The layer in training as a function of x alone, with new copies of the statistics in each call."""
    return lambda x: functional_call(layer, (parameters_of(layer), buffers_of(layer)), (x,))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("jacobian", [vjp_rows, jvp_columns, lambda f, x: jacrev(f)(x), lambda f, x: jacfwd(f)(x)])
def test_jacobians_equal_the_oracles(activation, jacobian):
    layer = layer_of(activation)
    x = normal(3, 3, 2, seed=1)
    truth = torch.autograd.functional.jacobian(lambda x: copy.deepcopy(oracle_of(layer))(x), x)
    assert_close(jacobian(with_own_statistics(layer), x), truth, scale=10)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("second", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))])
def test_second_derivatives_equal_the_oracles(activation, second):
    layer = layer_of(activation)
    x, weights = normal(3, 3, 2, seed=1), normal(3, 3, 2, seed=2)
    truth = torch.autograd.functional.hessian(lambda x: (oracle_of(layer)(x) ** 2 * weights).sum(), x)
    function = with_own_statistics(layer)
    assert_close(second(lambda x: (function(x) ** 2 * weights).sum())(x), truth, scale=100)


def test_grad_updates_the_statistics_it_is_given(backend, device):
    layer = layer_of().to(device)
    x, dy = normal(4, 3, 5, seed=1).to(device), normal(4, 3, 5, seed=2).to(device)
    parameters, buffers = parameters_of(layer), buffers_of(layer)
    found = grad(lambda p, b, x: (functional_call(layer, (p, b), (x,)) * dy).sum())(parameters, buffers, x)
    layer(x).backward(dy)
    assert_close(found["weight"], layer.weight.grad, scale=20)
    for name, value in layer.named_buffers():
        assert_close(buffers[name].double(), value.double(), name)
    assert buffers["num_batches_tracked"].item() == 2


TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x])),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["training parameters", "frozen parameters"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_a_transform_cannot_update_are_refused(device, transform, frozen):
    layer = layer_of().to(device).requires_grad_(not frozen)
    before = buffers_of(layer)
    with pytest.raises(RuntimeError, match="pass the buffers.*functional_call.*stack_module_state.*evaluation mode"):
        TRANSFORMS[transform](layer, normal(4, 3, 5, seed=1).to(device))
    assert_same(before, buffers_of(layer))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_evaluation_and_batch_statistics_need_no_more_than_the_layer(device, transform):
    x = normal(4, 3, 5, seed=1).to(device)
    untracked = brn.BatchRenorm1d(3, affine=False, track_running_stats=False)
    batchnorm = nn.BatchNorm1d(3, affine=False, track_running_stats=False)
    evaluated = layer_of().to(device).eval()
    folded = nn.BatchNorm1d(3).double().to(device).eval()
    folded.load_state_dict(evaluated.state_dict())
    for ours, torchs in ((evaluated, folded), (untracked, batchnorm)):
        found, expected = TRANSFORMS[transform](ours, x), TRANSFORMS[transform](torchs, x)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_each_sample(device):
    """In evaluation; in training a sample by itself is a batch, which one value per channel is not."""
    layer = layer_of("silu").to(device)
    parameters, x, dy = parameters_of(layer), normal(4, 3, seed=1).to(device), normal(4, 3, seed=2).to(device)

    def loss(p, x, dy):
        return (functional_call(layer, p, (x[None],)) * dy).sum()

    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        vmap(grad(loss), (None, 0, 0))(parameters, x, dy)
    layer.eval()
    found = vmap(grad(loss), (None, 0, 0))(parameters, x, dy)
    for i in range(4):
        layer.zero_grad()
        layer(x[i : i + 1]).backward(dy[i : i + 1])
        assert_close(found["weight"][i], layer.weight.grad, scale=10)


@pytest.mark.parametrize("transformed", ["grad", "vmap"])
def test_compiled_transforms_give_the_eager_derivatives(device, transformed, monkeypatch):
    """Compiled torch.func.grad was silently wrong: nothing in it required a gradient as autograd sees it."""
    monkeypatch.undo()  # Dynamo cannot trace poisoned empties, and may have met them
    torch._dynamo.trace_rules.get_torch_obj_rule_map.cache_clear()
    layer = layer_of("silu").to(device)
    parameters, x, dy = parameters_of(layer), normal(4, 3, 5, seed=1).to(device), normal(4, 3, 5, seed=2).to(device)
    buffers = buffers_of(layer)

    def function(p, b, x):
        return (functional_call(layer, (p, b), (x,)) * dy).sum()

    arguments = [parameters, buffers, x]
    if transformed == "vmap":
        arguments = torch.utils._pytree.tree_map(lambda t: torch.stack([t, t]), arguments)
    transform = {"grad": grad(function, argnums=(0, 2)), "vmap": vmap(function)}[transformed]
    twins = copy.deepcopy(arguments)
    compiled = torch.compile(transform, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), transform(*twins), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(arguments[1], twins[1], rtol=1e-12, atol=1e-12)


def test_forward_mode_without_torch_func(device):
    """With frozen parameters it once returned a tangent of zero, and updated the statistics."""
    layer = layer_of("silu").to(device).requires_grad_(False)
    x, tangent = normal(4, 3, 5, seed=1), normal(4, 3, 5, seed=2)
    jacobian = torch.autograd.functional.jacobian(lambda x: oracle_of(copy.deepcopy(layer).cpu())(x), x)
    truth = (jacobian.view(x.numel(), -1) @ tangent.view(-1)).view_as(x)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x.to(device), tangent.to(device)))
        assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent.cpu(), truth, scale=10)
    assert layer.num_batches_tracked.item() == 2
