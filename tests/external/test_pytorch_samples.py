"""PyTorch's own BatchNorm samples on our layer and function, limits closed: they must agree with PyTorch's."""

import copy

import pytest
import torch
import torch.nn.functional as F

import brn_kernels as brn

pytest.importorskip("expecttest", reason="PyTorch's own samples need expecttest")
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402

MODULES = {info.module_cls: info for info in module_db if info.module_cls in (
    torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d
)}  # fmt: skip
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def samples_of(module, device, dtype, training):
    info = MODULES[module]
    return info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)


def run(layer, arguments, keywords, seed):
    arguments = [a.detach().clone().requires_grad_() for a in arguments]
    y = layer(*arguments, **keywords)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed)).to(y.device)
    y.backward(dy)
    return [y, *(a.grad for a in arguments), *(p.grad for p in layer.parameters()), *layer.state_dict().values()]


@TRAINING
@DTYPES
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_modules(backend, device, module, dtype, training):
    count = 0
    for sample in samples_of(module, device, dtype, training):
        constructor, call = sample.constructor_input, sample.forward_input
        torchs = module(*constructor.args, **constructor.kwargs).to(device, dtype).train(training)
        ours_type = getattr(brn, module.__name__.replace("Norm", "Renorm"))
        ours = ours_type(*constructor.args, **constructor.kwargs, schedule=brn.ClipSchedule.batchnorm())
        ours.momentum = torchs.momentum  # the one default that differs
        ours.to(device, dtype).train(training).load_state_dict(torchs.state_dict(), strict=True)
        converted = brn.convert_batchnorm(
            copy.deepcopy(torchs), schedule=brn.ClipSchedule.batchnorm(), momentum=torchs.momentum
        )
        expected = run(torchs, call.args, call.kwargs, count)
        for layer in (ours, converted):
            found = run(layer, call.args, call.kwargs, count)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs)
        count += 1
    assert count >= 5, "the samples have moved"


@DTYPES
def test_functional(backend, device, dtype):
    infos = [info for info in op_db if info.name == "nn.functional.batch_norm"]
    count = 0
    for sample in infos[0].sample_inputs(device, dtype, requires_grad=True):
        keywords = dict(sample.kwargs)
        positional = dict(zip(("running_mean", "running_var", "weight", "bias"), sample.args, strict=False))
        keywords = {name: value for name, value in (positional | keywords).items()}
        defaults = {"running_mean": None, "running_var": None, "momentum": 0.1} | keywords
        results = []
        for function, extra in ((F.batch_norm, {}), (brn.batch_renorm, {"r_max": 1.0, "d_max": 0.0})):
            x = sample.input.detach().clone().requires_grad_()
            mine = {
                name: value.detach().clone() if isinstance(value, torch.Tensor) else value
                for name, value in defaults.items()
            }
            for name in ("running_mean", "running_var"):  # PyTorch's samples include negative variances
                if mine[name] is not None:
                    mine[name] = mine[name].abs() + 0.5
            parameters = [mine[name].requires_grad_() for name in ("weight", "bias") if mine.get(name) is not None]
            y = function(x, **mine, **extra)
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=dtype, device=device).view_as(y))
            gradients = [p.grad for p in (x, *parameters)]
            results.append([y, *gradients, *(mine[n] for n in ("running_mean", "running_var") if mine[n] is not None)])
        for ours, theirs in zip(*reversed(results), strict=True):
            torch.testing.assert_close(ours, theirs)
        count += 1
    assert count >= 8, "the samples have moved"
