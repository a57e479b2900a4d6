"""More than 2^31 elements: the forward and backward against the formula, half of the channels clipped."""

import gc

import pytest
import torch
from gpu_tools import DEVICE, IS_GPU, scaled

import brn_kernels as brn

SHAPE = scaled((1056, 32, 256, 256), (33, 4, 6, 5))  # 2.2e9 elements, 4.4 GB each tensor
BLOCK = 33  # images whose float64 values there is room for
NEEDED = 45 * 2**30
R_MAX, D_MAX, MOMENTUM, EPS = 1.2, 0.3, 0.1, 1e-5
ODD = torch.arange(SHAPE[1], device=DEVICE) % 2 == 1  # these channels clip, in r and in d; the others in neither
CLIPS = ODD[:, None, None]


def blocks():
    return [slice(n, n + BLOCK) for n in range(0, SHAPE[0], BLOCK)]


def filled(memory_format, mean, std):
    """Normal values of these channels' means and deviations, made a block at a time."""
    tensor = torch.empty(SHAPE, dtype=torch.bfloat16, device=DEVICE, memory_format=memory_format)
    for block in blocks():
        tensor[block].normal_()
        tensor[block].mul_(std).add_(mean)
    return tensor


def per_channel(tensors, sums):
    """The sum over all blocks of ``sums`` (of the block, in float64): one for each channel."""
    return sum(sums(*(t[block].double() for t in tensors)).sum((0, 2, 3)) for block in blocks())[:, None, None]


@pytest.mark.parametrize("with_residual", [False, True], ids=["relu", "residual and relu"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_more_than_2_to_the_31_elements(kernels, channels_last, with_residual):
    gc.collect()
    if IS_GPU:
        torch.cuda.empty_cache()  # what other tests have left to the allocator is free
        if torch.cuda.mem_get_info()[0] < NEEDED:
            pytest.skip(f"needs {NEEDED >> 30} GiB of free GPU memory")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    x = filled(memory_format, torch.where(CLIPS, 0.6, 0.05), torch.where(CLIPS, 1.5, 1.0)).requires_grad_()
    dy = filled(memory_format, 0.5, 1.0)
    residual = filled(memory_format, 0.1, 0.5).requires_grad_() if with_residual else None
    schedule = brn.ClipSchedule.constant(R_MAX, D_MAX)
    layer = brn.BatchRenorm2d(SHAPE[1], momentum=MOMENTUM, schedule=schedule, activation="relu").to(DEVICE)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-0.5, 0.5)
    y = layer(x, residual)
    y.backward(dy)

    m = SHAPE[0] * SHAPE[2] * SHAPE[3]
    weight, bias = (p.detach().double()[:, None, None] for p in (layer.weight, layer.bias))
    given = [t.detach() for t in (x, dy, *([residual] if with_residual else []))]
    mean = per_channel(given[:1], lambda x: x) / m
    var = per_channel(given[:1], lambda x: (x - mean).square()) / m
    std = (var + EPS).sqrt()
    r, d = (std / (1 + EPS) ** 0.5).clamp(1 / R_MAX, R_MAX), (mean / (1 + EPS) ** 0.5).clamp(-D_MAX, D_MAX)

    def before_relu(x, residual=None):
        z = ((x - mean) / std * r + d) * weight + bias
        return z if residual is None else z + residual

    def gated(x, dy, *residual):
        return dy * (before_relu(x, *residual) > 0)

    s1 = per_channel(given, gated)
    s2 = per_channel(given, lambda x, dy, *rest: gated(x, dy, *rest) * (x - mean) / std)

    # float32 sums of m values, merged pairwise
    def same(ours, truth):
        torch.testing.assert_close(ours.double(), truth.flatten(), rtol=2e-4, atol=2e-4 * truth.abs().max().item())

    assert torch.equal(layer.clipped, ODD) and layer.num_batches_tracked == 1
    same(layer.running_mean, MOMENTUM * mean)
    same(layer.running_var, 1 - MOMENTUM + MOMENTUM * var * m / (m - 1))
    same(layer.bias.grad, s1)
    same(layer.weight.grad, r * s2 + d * s1)
    for n in (0, SHAPE[0] // 2, SHAPE[0] - 1):  # the last lies beyond 2^31
        image = [t[n : n + 1].double() for t in given]
        z = before_relu(image[0], *image[2:])
        clear = z.abs() > 1e-4  # where no rounding decides which side of the ReLU it is on
        mask = (z > 0).double()
        dx = weight * r / std * (image[1] * mask - s1 / m - (image[0] - mean) / std * s2 / m)

        # bfloat16's unit in the last place: the interpreter rounds to zero
        def close(ours, truth, what, clear=clear, n=n):
            error = (ours[n : n + 1].detach().double() - truth).abs()
            assert (error <= 2**-7 * truth.abs() + 1e-4)[clear.expand_as(error)].all(), (what, n)

        close(y, z.relu(), "y")
        close(x.grad, dx, "dx")
        if with_residual:
            close(residual.grad, image[1] * mask, "dresidual")
