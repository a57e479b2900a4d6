"""Running statistics over a data set, and weight averaging."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import brn_kernels as brn


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 3), brn.BatchRenorm1d(3, schedule=brn.ClipSchedule.constant(1.5, 0.5)), nn.BatchNorm1d(3)
    )


def loader():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) * 3 + 1 for _ in range(5)]


def state_of(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def test_it_is_update_bn_for_our_layers():
    model = model_of()
    peer = copy.deepcopy(model)
    brn.revert_to_batchnorm(peer)
    model[1].num_batches_tracked.fill_(17)
    brn.update_stats(model, loader())
    update_bn(loader(), peer)
    for ours, torchs in zip(list(model)[1:], list(peer)[1:], strict=True):
        assert torch.allclose(ours.running_mean, torchs.running_mean, atol=1e-6)
        assert torch.allclose(ours.running_var, torchs.running_var, rtol=1e-5)
    assert model[1].num_batches_tracked.item() == 17, "the schedule goes on where it was"


def test_update_bn_skips_our_layers():
    """Why update_stats exists: update_bn looks for _BatchNorm only and runs ours as in any training step."""
    model = model_of()
    update_bn(loader(), model)
    peer = model_of()
    brn.update_stats(peer, loader())
    assert not torch.allclose(model[1].running_mean, peer[1].running_mean, atol=0.01)


@pytest.mark.parametrize("batch", [lambda x: x, lambda x: [x, "label"], lambda x: (x, 1)], ids=["x", "list", "tuple"])
def test_kinds_of_batches(batch):
    model, peer = model_of(), model_of()
    brn.update_stats(model, map(batch, loader()), device="cpu")
    brn.update_stats(peer, loader())
    assert torch.equal(model[1].running_var, peer[1].running_var)


def test_flags_momenta_schedules_and_gradients_are_as_before():
    model = model_of().eval()
    model[2].train()
    momenta = [layer.momentum for layer in list(model)[1:]]
    schedule = model[1].schedule
    brn.update_stats(model, loader())
    assert [m.training for m in model] == [False, False, True] and not model.training
    assert [layer.momentum for layer in list(model)[1:]] == momenta and model[1].schedule is schedule
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fault", ["no batch", "bad batch", "bad loader"])
def test_a_failure_leaves_every_layer_as_it_was(fault):
    model = model_of()
    model(loader()[0])
    before = state_of(model)

    def batches():
        if fault == "no batch":
            return
        yield from loader()[:2]
        if fault == "bad loader":
            raise OSError("disk")
        yield torch.randn(8, 5)

    with pytest.raises((ValueError, RuntimeError, OSError)):
        brn.update_stats(model, batches())
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert model[1].momentum == 0.01 and model[1].schedule == brn.ClipSchedule.constant(1.5, 0.5)


def test_a_model_without_such_layers_is_not_run():
    class Fails(nn.Module):
        def forward(self, x):
            raise AssertionError

    brn.update_stats(Fails(), loader())


@pytest.mark.parametrize("average, use_buffers", [("SWA", False), ("EMA", False), ("EMA", True)])
def test_weight_averaging(average, use_buffers):
    """SWA of buffers is left out: it subtracts them, which PyTorch has no meaning for with the bools of ``clipped``."""
    model = model_of()
    average_fn = get_ema_multi_avg_fn(0.9) if average == "EMA" else None
    averaged = AveragedModel(model, multi_avg_fn=average_fn, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in loader():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    brn.update_stats(averaged, loader())
    assert averaged.module[1].clipped.dtype == torch.bool
    averaged.eval()(loader()[0])
