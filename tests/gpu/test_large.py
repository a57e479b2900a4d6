"""More than 2^31 elements."""

import pytest
import torch

import brn_kernels as brn

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.xdist_group("large")]  # one at a time


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_more_than_2_to_the_31_elements(channels_last):
    shape = (1056, 32, 256, 256)  # 2.2e9 elements, 4.4 GB
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    dy = torch.empty_like(x)
    for n in range(0, shape[0], 32):
        x[n : n + 32].normal_(0.3, 1.5)
        dy[n : n + 32].normal_()
    x.requires_grad_()
    layer = brn.BatchRenorm2d(32, schedule=brn.ClipSchedule.constant(1.2, 0.1), activation="relu").cuda()
    y = layer(x)
    y.backward(dy)
    mean = torch.stack([x[n].double().mean((1, 2)) for n in range(shape[0])]).mean(0)
    var = torch.stack([(x[n].double() - mean[:, None, None]).square().mean((1, 2)) for n in range(shape[0])]).mean(0)
    r = (var + 1e-5).sqrt().clamp(1 / 1.2, 1.2)
    d = mean.clamp(-0.1, 0.1)
    assert torch.allclose(layer.running_mean.double(), 0.01 * mean, rtol=1e-4)
    for n in (0, 500, shape[0] - 1):  # the last lies beyond 2^31
        z = (x[n].double() - mean[:, None, None]) * (r / (var + 1e-5).sqrt())[:, None, None] + d[:, None, None]
        assert (y[n].double() - z.relu()).abs().max() < 0.05
    total = sum(x.grad[n].double().sum((1, 2)) for n in range(shape[0]))
    assert (total.abs() / (shape[0] * 256 * 256)).max() < 1e-3, "the sum of dx is zero"
