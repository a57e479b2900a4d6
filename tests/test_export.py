"""A trained network predicts the same after export, reverting, folding and fusing for quantization."""

import copy

import pytest
import torch
import torch.fx.experimental.optimization
from tolerances import assert_close, assert_three_way
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

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


def truth(model, x):
    """Its predictions in float64."""
    return copy.deepcopy(model).double()(x.double()).detach()


def reverted_copy(model):
    return brn.revert_to_batchnorm(copy.deepcopy(model))


@pytest.mark.parametrize("reverted", [False, True])
def test_torch_export_for_one_batch_size(model, reverted):
    program = torch.export.export(reverted_copy(model) if reverted else model, (images(5),))
    assert torch.equal(program.module()(images(5, seed=2)), model(images(5, seed=2))), "the same operators"


@pytest.mark.parametrize("reverted", [False, True])
def test_torch_export_for_any_batch(model, reverted):
    source = reverted_copy(model) if reverted else model
    program = torch.export.export(source, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (2, 5):
        assert torch.equal(program.module()(images(batch)), model(images(batch))), "the same operators"
    assert not any("brn_kernels" in str(node.target) for node in program.graph.nodes), "runs without the package"


@pytest.fixture
def run_as_onnx(tmp_path):
    """``run_as_onnx(model, *batches)``: exported with the first batch, what onnxruntime predicts for each."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    def run(model, *batches):
        path = str(tmp_path / "model.onnx")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, batches[:1], path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return [torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for x in batches]

    return run


@pytest.mark.parametrize("reverted", [False, True])
def test_onnx_equals_eager(run_as_onnx, model, reverted):
    batches = [images(2), images(5)]
    found = run_as_onnx(reverted_copy(model) if reverted else model, *batches)
    for x, y in zip(batches, found, strict=True):
        assert_close(y, truth(model, x))


def test_onnx_of_a_half_model_after_reverting(run_as_onnx, model):
    """Before it, onnxruntime refuses the file: a half input beside float32 statistics."""
    x = images(5).half()
    _, y = run_as_onnx(reverted_copy(model.half()), images(2).half(), x)
    assert_three_way(y, model(x), truth(model, x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # it records no check of shapes
@pytest.mark.parametrize("reverted", [False, True])
def test_jit_trace(model, reverted):
    with torch.no_grad():  # recorded with gradients, a layer copies its statistics
        traced = torch.jit.trace(reverted_copy(model) if reverted else model, (images(2),))
        assert torch.equal(traced(images(5)), model(images(5)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_script_after_a_revert():
    model = trained(Plain)
    assert torch.equal(torch.jit.script(reverted_copy(model))(images(5)), model(images(5)))


def test_quantization_fuses_what_a_revert_leaves():
    model = trained(Plain).double()
    fused = torch.ao.quantization.fuse_modules(reverted_copy(model), [["0", "1", "2"], ["3", "4"]])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert_close(fused(images(5).double()), truth(model, images(5)))


def test_quantization_fuses_beside_a_layer_with_activation_which_it_refuses():
    model = trained(Block).double()
    reverted = reverted_copy(model)
    fused = torch.ao.quantization.fuse_modules(reverted, [["conv3", "norm3"]])
    assert type(fused.norm3) is nn.Identity
    assert_close(fused(images(5).double()), truth(model, images(5)))
    for unfit in (reverted, model):  # loudly: nothing is dropped
        with pytest.raises(AssertionError, match="did not find fuser method"):
            torch.ao.quantization.fuse_modules(unfit, [["conv1", "norm1"]])


def test_every_convolution_folds_after_a_revert():
    model = trained(Plain).double()
    folded = torch.fx.experimental.optimization.fuse(reverted_copy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_close(folded(images(5).double()), truth(model, images(5)))


def test_folding_leaves_a_layer_with_activation_alone():
    model = trained(Block).double()
    folded = torch.fx.experimental.optimization.fuse(reverted_copy(model))
    assert [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["norm1", "norm2"]
    assert_close(folded(images(5).double()), truth(model, images(5)))


def test_folding_before_a_revert_changes_nothing(model):
    folded = torch.fx.experimental.optimization.fuse(model)
    assert sum(isinstance(m, brn.BatchRenorm2d) for m in folded.modules()) == (3 if isinstance(model, Block) else 2)
    assert torch.equal(folded(images(5)), model(images(5)))


@pytest.mark.parametrize("reverted", [False, True])
def test_a_pair_folds(reverted):
    model = trained(Plain).double()
    norms = reverted_copy(model) if reverted else model
    folded = nn.Sequential(fuse_conv_bn_eval(norms[0], norms[1]), nn.ReLU(), fuse_conv_bn_eval(norms[3], norms[4]))
    assert_close(folded(images(5).double()), truth(model, images(5)))


@pytest.mark.parametrize("reverted", [False, True])
def test_a_pair_folds_without_its_activation(reverted):
    """``fuse_conv_bn_eval`` reads weights and statistics alone, so what activates is to be put behind it."""
    model = trained(Block).double()
    norms = reverted_copy(model) if reverted else model
    folded = nn.Sequential(fuse_conv_bn_eval(norms.conv1, norms.norm1), nn.ReLU())
    assert_close(folded(images(5).double()), model.norm1(model.conv1(images(5).double())).detach())


def test_a_linear_layer_folds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), brn.BatchRenorm1d(3, momentum=0.5)).double()
    model(torch.randn(8, 4, dtype=torch.float64) * 2 + 1)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_close(fuse_linear_bn_eval(*model.eval())(x), model(x).detach())
