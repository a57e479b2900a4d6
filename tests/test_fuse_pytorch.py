"""``fuse``: undone, converted, deployed, and together with the rest of PyTorch."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
from fuse_models import OPEN, Block, assert_same, calls, fused_block, images, module_of, norm, pair
from torch import nn
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn

# There and back


@pytest.mark.parametrize("momentum", [0.1, None])
def test_names_parameters_and_checkpoints(momentum):
    model = Block(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=momentum)))
    model.norm1.momentum = momentum
    model.norm1.note = "mine"
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    types = [type(module) for module in model.modules()]
    plain = copy.deepcopy(model)
    assert brn.fuse(model) is model
    assert isinstance(model, Block) and type(model).__name__ == "FusedBlock" and "FusedBlock" in repr(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(model.state_dict(keep_vars=True)[name] is tensor for name, tensor in before.items())
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert isinstance(model.norm1, brn.BatchRenorm2d) and model.norm1.momentum is momentum
    assert type(model.norm2) is nn.BatchNorm2d  # not of a site, so left as it is
    assert_same(plain.double(), model.double())
    assert brn.unfuse(model) is model
    assert [type(module) for module in model.modules()] == types
    assert model.norm1.momentum is momentum and model.norm1.note == "mine"
    assert vars(model.norm1).keys() == vars(plain.norm1).keys()
    assert_same(plain, model)


def test_fusing_twice_and_unfusing_what_is_not_fused():
    plain, fused = fused_block()
    modules, report = list(fused.modules()), brn.fusion_report(fused)
    types = [type(module) for module in modules]
    brn.fuse(fused)
    assert list(fused.modules()) == modules and [type(module) for module in fused.modules()] == types
    assert brn.fusion_report(fused) == report
    brn.unfuse(plain)
    assert type(plain) is Block


def test_fusing_again_follows_the_model():
    plain, fused = fused_block()
    fused.act = nn.GELU()
    brn.fuse(fused)
    assert brn.fusion_report(fused).counts() == {"norm + add": 1}
    assert type(fused.norm1) is nn.BatchNorm2d and type(fused.norm2) is brn.BatchRenorm2d
    fused.norm2 = nn.Identity()
    brn.fuse(fused)
    assert type(fused) is Block


def test_a_norm_is_given_back_as_the_model_itself():
    layer = brn.fuse(norm())
    assert type(layer) is nn.BatchNorm2d and brn.fusion_report(layer).left[0].reason == "is the model itself"


def test_converting_a_fused_model():
    plain, fused = fused_block()
    for each in (plain, fused):
        brn.convert_batchnorm(each, schedule=OPEN, momentum=0.3)
    assert fused.norm1.schedule == OPEN and fused.norm1.momentum == 0.3
    assert calls(copy.deepcopy(fused)) == 2
    assert_same(plain, fused)
    brn.unfuse(fused)
    assert type(fused.norm1) is brn.BatchRenorm2d and type(fused) is Block


def test_reverting_a_fused_model_gives_a_plain_one_that_folds():
    branch = nn.Sequential(nn.Conv2d(4, 4, 1), norm(), nn.ReLU(), nn.Conv2d(4, 4, 1), norm())
    model = module_of(lambda self, x: F.relu(self.branch(x) + x), branch=branch)
    _, fused = pair(model, renorm=True)
    fused(images())
    expected = fused.eval()(images()).detach()
    brn.revert_to_batchnorm(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(fused(images()), expected, rtol=1e-9, atol=1e-9)
    folded = torch.fx.experimental.optimization.fuse(fused)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(images()), expected, rtol=1e-9, atol=1e-9)
    conv, layer = fused.branch[0], fused.branch[1]
    one = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, layer)
    torch.testing.assert_close(one(images()), layer(conv(images())), rtol=1e-9, atol=1e-9)


def test_deployed_as_it_is_or_reverted():
    """torch.export and ONNX's exporter of the fused model and of the reverted one; both graphs hold aten only."""
    _, fused = pair(Block())
    fused = fused.float().eval()
    x = images().float()
    expected = fused(x)
    for model in (fused, brn.revert_to_batchnorm(copy.deepcopy(fused))):
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert all("aten" in str(n.target) for n in program.graph.nodes if n.op == "call_function")
        torch.testing.assert_close(program.module()(x), expected)
    assert type(fused).__name__ == "FusedBlock"


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, fused = pair(Block())
    fused, x = fused.float().eval(), images().float()
    for i, model in enumerate((fused, brn.revert_to_batchnorm(copy.deepcopy(fused)))):
        path = str(tmp_path / f"{i}.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), fused(x).detach(), rtol=1e-4, atol=1e-5)


# Together with the rest of PyTorch


def test_deepcopy_pickle_and_save():
    plain, fused = pair(nn.Sequential(Block(), Block(nn.Sequential(nn.Conv2d(4, 4, 1), norm()))))
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)):
        assert type(again[0]) is type(fused[0])
        assert calls(copy.deepcopy(again)) == 4
        assert_same(copy.deepcopy(plain), copy.deepcopy(again))
        brn.unfuse(again)
        assert type(again[0]) is Block and type(again[0].norm1) is nn.BatchNorm2d


def test_what_another_process_unpickles_is_fused():
    """There the class has to be made anew."""
    import brn_kernels.fused_class as classes

    _, fused = fused_block()
    saved = pickle.dumps(fused)
    made = dict(classes._classes)
    classes._classes.clear()
    try:
        again = pickle.loads(saved)
        assert type(again) is not type(fused) and type(again).__name__ == "FusedBlock"
        assert calls(again) == 2
        with pytest.warns(UserWarning, match="loaded unfused"):  # as by a later version without that function
            assert type(classes._rebuild(Block, "from brn_kernels import no_such_thing\n")) is Block
    finally:
        classes._classes.clear()
        classes._classes.update(made)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole(training, renorm):
    plain, fused = pair(nn.Sequential(Block(), Block(nn.Sequential(nn.Conv2d(4, 4, 1), norm()))), renorm)
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    plain.train(training)
    x = images()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-9, atol=1e-9)
    dy = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    for each in (compiled, plain):
        each(x).backward(dy)
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_autocast():
    plain, fused = fused_block()
    plain, fused, x = plain.float(), fused.float(), images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(x), fused(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    plain, fused = pair(Block(), renorm=True)

    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    assert_same(Checkpointed(plain), Checkpointed(fused))


def test_function_transforms():
    plain, fused = fused_block()
    plain.eval(), fused.eval()
    x = images()
    state = dict(plain.named_parameters()) | dict(plain.named_buffers())
    assert torch.equal(torch.func.functional_call(fused, state, (x,)), torch.func.functional_call(plain, state, (x,)))

    def loss(parameters, model):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    parameters = {name: p.detach() for name, p in plain.named_parameters()}
    ours, theirs = (torch.func.grad(loss)(parameters, model) for model in (fused, plain))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9)


def test_symbolic_trace_sees_the_model_as_it_was():
    plain, fused = pair(nn.Sequential(Block(), norm(), nn.ReLU()))
    traced = torch.fx.symbolic_trace(fused)
    assert [n.target for n in traced.graph.nodes] == [n.target for n in torch.fx.symbolic_trace(plain).graph.nodes]
    assert_same(plain, traced)


def test_distributed_data_parallel():
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch without Gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, fused = fused_block()
        plain = nn.parallel.DistributedDataParallel(plain)
        assert calls(copy.deepcopy(fused)) == 2
        late = brn.fuse(nn.parallel.DistributedDataParallel(brn.unfuse(copy.deepcopy(fused))))
        assert brn.fusion_report(late).counts() == {"norm + act": 1, "norm + add + act": 1}
        for each in (nn.parallel.DistributedDataParallel(fused), late):
            assert_same(copy.deepcopy(plain), each)
    finally:
        dist.destroy_process_group()


def test_a_replica_and_a_parametrized_block():
    plain, fused = fused_block()
    assert type(fused._replicate_for_data_parallel()) is type(fused)

    class Halved(nn.Module):
        def forward(self, w):
            return w / 2

    for each in (plain, fused):
        nn.utils.parametrize.register_parametrization(each.conv1, "weight", Halved())
    assert_same(plain, fused)
    fused.__class__ = type("Wrapped", (type(fused),), {})  # as FSDP does
    assert "was replaced" in brn.fusion_report(brn.fuse(fused)).left[0].reason
    assert type(fused).__name__ == "Wrapped"


def test_an_optimizer_made_before_and_a_frozen_norm():
    plain, fused = pair(Block())
    fresh = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (plain, fresh)]
    brn.fuse(fresh)
    for each in (plain, fresh):
        each.norm1.eval()
        each(images()).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(plain.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_the_report():
    _, fused = pair(Block(nn.Sequential(nn.Conv2d(4, 4, 1), norm())))
    report = brn.fusion_report(fused)
    assert [(row.norm, row.kind, row.activation, row.owner) for row in report.fused] == [
        ("norm1", "norm + act", "relu", ""), ("shortcut.1", "norm + add + act", "relu", ""),
    ]  # fmt: skip
    text = str(report)
    assert text.splitlines()[-1] == "2 fused (1 norm + act, 1 norm + add + act), 1 left"
    assert "norm2" in text and "added to the result of another norm" in text
    before = brn.fusion_report(brn.unfuse(fused))
    assert not before.fused and before.left[0].reason == "fuse it by brn.fuse"
    norms = {name for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert sorted(row.norm for row in before.left) == sorted(norms)
