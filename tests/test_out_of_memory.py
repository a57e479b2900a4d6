"""When memory runs out in the middle of a call, its statistics are those from before it."""

from unittest import mock

import pytest
import torch

import brn_kernels as brn
from brn_kernels import node


class Limited:
    """Stands in for an allocating function: the one call that ``after`` others of its kind precede fails."""

    def __init__(self, patch, after):
        self.left = after
        for name in ("empty", "empty_like", "zeros"):
            patch.setattr(torch, name, self.limited(getattr(torch, name)))

    def limited(self, make):
        def made(*arguments, **keywords):
            self.left -= 1
            if self.left == -1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return make(*arguments, **keywords)

        return made


@pytest.mark.parametrize("schedule", [brn.ClipSchedule.constant(3, 5), brn.ClipSchedule.auto()], ids=["fixed", "auto"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("activation, with_residual", [("relu", True), (None, False)], ids=str)
def test_statistics_outlive_it(monkeypatch, backend, device, schedule, channels_last, activation, with_residual):
    monkeypatch.setattr(node, "module", lambda: None)  # calls in C++ are tested below
    layer = brn.BatchRenorm2d(24, momentum=0.1, schedule=schedule, activation=activation).to(device)
    x, residual = torch.randn(2, 6, 24, 7, 5, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    given = (x.requires_grad_(), residual) if with_residual else (x.requires_grad_(),)
    layer(*given)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    failed = 0
    for after in range(20):
        with pytest.MonkeyPatch.context() as patch:
            limited = Limited(patch, after)
            try:
                layer(*given)
            except torch.OutOfMemoryError:
                failed += 1
                for name, buffer in layer.named_buffers():
                    assert torch.equal(buffer, before[name]), (after, name)
                continue
        assert limited.left >= 0, "it was swallowed"
        break
    assert failed >= 1 and layer.num_batches_tracked == 2


@pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`")
def test_statistics_outlive_it_in_cpp():
    """All memory of a call in C++ is there before anything is computed."""
    layer = brn.BatchRenorm2d(24)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    small = torch.randn(1, 24, 7, 5)
    in_python = mock.Mock(side_effect=AssertionError("the call was Python's"))
    with brn.use_backend("native"), mock.patch("brn_kernels.backends.native.forward", in_python):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="not enough memory|can't allocate"):
                layer(small.expand(2**38, 24, 7, 5).requires_grad_())
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
