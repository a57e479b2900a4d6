"""What goes wrong in a training and must not cost it its statistics."""

import copy

import pytest
import torch

import brn_kernels as brn

pytestmark = pytest.mark.usefixtures("kernels")
SHAPE = (64, 64, 128, 128)  # 268 MB


@pytest.fixture
def little_memory():
    """Room for one and a half results of SHAPE beside what is held when the test calls it."""

    def limit():
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        held = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((held + 400e6) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def buffers_of(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_out_of_memory_leaves_the_statistics_untouched(little_memory, channels_last):
    layer = brn.BatchRenorm2d(SHAPE[1], momentum=0.1, schedule=brn.ClipSchedule.constant(3, 5)).cuda()
    x = torch.randn(SHAPE, device="cuda")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    before = buffers_of(layer)
    little_memory()
    ballast = [torch.empty(10_000_000, device="cuda") for _ in range(8)]  # 320 MB: y finds no room
    with pytest.raises(torch.OutOfMemoryError):
        layer(x)
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
    del ballast
    expected = copy.deepcopy(layer)
    y = layer(x)
    with brn.use_backend("reference"):
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.allclose(y, expected(x), rtol=1e-4, atol=1e-5), "the next call works"
    assert torch.allclose(layer.running_var, expected.running_var)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_an_overflowed_batch_shows_in_its_channel_and_stays_out_of_the_statistics(value, channels_last):
    layer = brn.BatchRenorm2d(40, momentum=0.1, schedule=brn.ClipSchedule.constant(3, 5)).cuda()
    x = torch.randn(16, 40, 28, 28, device="cuda").bfloat16()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    layer(x)
    before = buffers_of(layer)
    x[7, 13, 5, 5] = value
    y = layer(x.requires_grad_())
    y.backward(torch.randn_like(y))
    others = [c for c in range(40) if c != 13]
    assert not y[:, 13].isfinite().any() and y[:, others].isfinite().all()
    assert not x.grad[:, 13].isfinite().any() and x.grad[:, others].isfinite().all()
    for name in ("running_mean", "running_var"):
        now = getattr(layer, name)
        assert now[13] == before[name][13] and (now[others] != before[name][others]).all()
    assert layer.clipped.tolist() == [c == 13 for c in range(40)] and layer.num_batches_tracked == 2
