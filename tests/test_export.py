"""A trained network predicts the same after export, reverting, folding and fusing for quantization."""

import copy

import pytest
import torch
import torch.fx.experimental.optimization
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import brn_kernels as brn


class Block(nn.Module):
    """Every kind of layer: with an activation, with a residual too, and plain."""

    def __init__(self):
        super().__init__()
        schedule = brn.ClipSchedule.constant(2, 1)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = brn.BatchRenorm2d(8, momentum=0.2, schedule=schedule, activation="relu")
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = brn.BatchRenorm2d(8, momentum=0.2, schedule=schedule, activation="hardswish")
        self.conv3 = nn.Conv2d(8, 4, 1)
        self.norm3 = brn.BatchRenorm2d(4, momentum=0.2, schedule=schedule)

    def forward(self, x):
        h = self.norm1(self.conv1(x))
        h = self.norm2(self.conv2(h), residual=h)
        return self.norm3(self.conv3(h)).mean((2, 3))


class Plain(nn.Sequential):
    """Convolution, normalization, ReLU as modules of their own: what fusing looks for."""

    def __init__(self):
        norms = [brn.BatchRenorm2d(c, momentum=0.2, schedule=brn.ClipSchedule.constant(2, 1)) for c in (8, 4)]
        super().__init__(nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), norms[1])


def trained(model_type):
    torch.manual_seed(0)
    model = model_type()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(8):
        x = torch.randn(8, 3, 10, 10) * 2 + 0.5
        y = model(x)
        (y * torch.randn_like(y)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    norms = [m for m in model.modules() if isinstance(m, brn.BatchRenorm2d)]
    assert all((norm.running_var - 1).abs().max() > 0.1 for norm in norms), "statistics that matter"
    return model.eval()


@pytest.fixture(params=[Block, Plain])
def model(request):
    return trained(request.param)


def images(batch, seed=1):
    return torch.randn(batch, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverted", [False, True])
def test_torch_export_for_any_batch(model, reverted):
    expected = model(images(5))
    source = brn.revert_to_batchnorm(copy.deepcopy(model)) if reverted else model
    program = torch.export.export(source, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    close(program.module()(images(5)), expected)
    assert not any("brn_kernels" in str(node.target) for node in program.graph.nodes), "runs without the package"


@pytest.mark.parametrize("reverted", [False, True])
def test_onnx_equals_eager(model, reverted, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    expected = model(images(5))
    source = brn.revert_to_batchnorm(copy.deepcopy(model)) if reverted else model
    path = str(tmp_path / "model.onnx")
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(source, (images(2),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images(5).numpy()})
    close(torch.from_numpy(found), expected.detach())


def test_quantization_fuses_what_a_revert_leaves():
    model = trained(Plain)
    expected = model(images(5))
    reverted = brn.revert_to_batchnorm(copy.deepcopy(model))
    fused = torch.ao.quantization.fuse_modules(reverted, [["0", "1", "2"], ["3", "4"]])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    close(fused(images(5)), expected)


def test_convolutions_fold():
    model = trained(Plain)
    expected = model(images(5))
    reverted = brn.revert_to_batchnorm(copy.deepcopy(model))
    close(torch.fx.experimental.optimization.fuse(reverted)(images(5)), expected)
    for norms in (model, reverted):  # a pair at a time works without reverting too
        folded = nn.Sequential(fuse_conv_bn_eval(norms[0], norms[1]), nn.ReLU(), fuse_conv_bn_eval(norms[3], norms[4]))
        close(folded(images(5)), expected)
