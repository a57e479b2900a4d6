"""How far a result may be from the float64 truth, and why."""

import torch

# A normalized value is a few roundings from the truth (the mean's, the difference's, the scale's, the affine's), and
# each statistic a sum whose rounding errors grow like the logarithm of its length at worst here: 32 units in the last
# place of the largest value in play bound both, with room for dgamma's and dbeta's longer sums.
UNITS = 32


def assert_close(actual, truth, what="result", scale=1.0):
    """|actual - truth| within UNITS roundings of the largest value in play (``scale``), for float32 and float64."""
    assert actual.shape == truth.shape, (what, actual.shape, truth.shape)
    scale = max(scale, truth.abs().max().item()) if truth.numel() else scale
    error = (actual.detach().double() - truth.detach()).abs().max().item() if truth.numel() else 0.0
    bound = UNITS * torch.finfo(actual.dtype).eps * scale
    assert error <= bound, f"{what}: error {error:.3g} over {bound:.3g} (largest value {scale:.3g})"


def assert_three_way(actual, torchs, truth, what="result"):
    """|ours - fp64| <= 2 * |torch's same dtype - fp64| + one unit in the last place of the largest value."""
    ours = (actual.detach().double() - truth).abs().max()
    theirs = (torchs.detach().double() - truth).abs().max()
    ulp = torch.finfo(actual.dtype).eps * truth.abs().max()
    assert ours <= 2 * theirs + ulp, f"{what}: our error {ours:.3g}, torch's {theirs:.3g}, one ulp {ulp:.3g}"


def assert_gradients_close(model, other):
    """The float64 gradients of two networks; some are zero but for rounding, so the largest of all sets the scale."""
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-7, atol=1e-10 * largest, msg=name)
