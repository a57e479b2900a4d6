"""What goes wrong in a training and must not cost it its statistics."""

import gc

import pytest
import torch
from gpu_tools import DEVICE, scaled

import brn_kernels as brn

pytestmark = pytest.mark.usefixtures("kernels")
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])


def buffers_of(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
@LAYOUTS
def test_an_overflowed_batch_shows_in_its_channel_and_stays_out_of_the_statistics(value, channels_last):
    n, channels, side, bad = scaled((16, 40, 28, 13), (3, 3, 4, 1))
    layer = brn.BatchRenorm2d(channels, momentum=0.1, schedule=brn.ClipSchedule.constant(3, 5)).to(DEVICE)
    x = torch.randn(n, channels, side, side, device=DEVICE).bfloat16()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    layer(x)
    before = buffers_of(layer)
    x[n // 2, bad, 3, 3] = value
    y = layer(x.requires_grad_())
    y.backward(torch.randn_like(y))
    others = [c for c in range(channels) if c != bad]
    assert not y[:, bad].isfinite().any() and y[:, others].isfinite().all()
    assert not x.grad[:, bad].isfinite().any() and x.grad[:, others].isfinite().all()
    for name in ("running_mean", "running_var"):
        now = getattr(layer, name)
        assert now[bad] == before[name][bad] and (now[others] != before[name][others]).all()
    assert layer.clipped.tolist() == [c == bad for c in range(channels)] and layer.num_batches_tracked == 2


@pytest.mark.needs_gpu
@pytest.mark.xdist_group("memory")
@LAYOUTS
@pytest.mark.parametrize("activation, with_residual", [("relu", True), (None, False)], ids=str)
def test_running_out_of_memory_leaves_the_statistics(channels_last, activation, with_residual):
    """For real: this process may take no more than what it has, and then a little more, until the forward fits."""
    layer = brn.BatchRenorm2d(64, momentum=0.1, schedule=brn.ClipSchedule.constant(3, 5), activation=activation).cuda()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(64, 64, 112, 112, device="cuda").to(memory_format=memory_format).requires_grad_()  # 205 MB
    given = (x, torch.randn_like(x)) if with_residual else (x,)
    dy = torch.randn_like(x)
    layer(*given).backward(dy)  # compiles, and makes what is kept
    expected = buffers_of(layer)
    failed, total = 0, torch.cuda.get_device_properties(0).total_memory
    try:
        for room in (0, 2**20, 2**27, 2**28, 2**29, 2**31):
            x.grad = None
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
            try:
                y = layer(*given)
            except torch.OutOfMemoryError:
                failed += 1
                for name, buffer in layer.named_buffers():
                    assert torch.equal(buffer, expected[name]), (room, name)
                continue
            expected = buffers_of(layer)
            try:
                y.backward(dy)
            except torch.OutOfMemoryError:
                del y
                for name, buffer in layer.named_buffers():
                    assert torch.equal(buffer, expected[name]), (room, name)
                continue
            break
        else:
            pytest.fail("it never fitted")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed, "nothing ran out of memory"
    assert layer.num_batches_tracked == expected["num_batches_tracked"] >= 2
