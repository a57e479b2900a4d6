"""What goes wrong in a training and must not cost it its statistics."""

import pytest
import torch

import brn_kernels as brn

pytestmark = pytest.mark.usefixtures("kernels")


def buffers_of(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


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
