"""``fuse``: no later change of the model makes it wrong, and forwards that must not be traced are left."""

import copy
import random

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
from fuse_models import Block, assert_same, calls, fused_block, images, module_of, norm, pair
from torch import nn
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn

# What a trace bakes in, changed afterwards


def test_a_number_that_the_forward_reads():
    plain, fused = fused_block()
    for each in (plain, fused):
        each.scale = 2.0
    assert_same(plain, fused)
    assert calls(fused) == 0


def test_an_argument_that_is_not_the_default():
    plain, fused = fused_block()
    x = images()
    assert torch.equal(plain.eval()(x, skip=True), fused.eval()(x, skip=True))
    assert torch.equal(plain(x, skip=False), fused(x, skip=False))


@pytest.mark.parametrize("registered", [False, True])
def test_a_child_that_was_none(registered):
    block = Block()
    if registered:
        del block.shortcut
        block.register_module("shortcut", None)
    plain, fused = pair(block)
    assert calls(copy.deepcopy(fused)) == 2
    for each in (plain, fused):
        torch.manual_seed(2)
        del each.shortcut
        each.shortcut = nn.Conv2d(4, 4, 1).double()
    assert_same(plain, fused)


def test_a_list_of_modules_that_grows():
    def forward(self, x):
        for block in self.blocks:
            x = F.relu(self.norm(block(x)) + x)
        return x

    plain, fused = pair(module_of(forward, norm=norm(), blocks=nn.ModuleList([nn.Conv2d(4, 4, 1)])))
    assert calls(copy.deepcopy(fused)) == 1
    for each in (plain, fused):
        torch.manual_seed(2)
        each.blocks.append(nn.Conv2d(4, 4, 1).double())
    assert_same(plain, fused)


def test_a_sequential_that_changes():
    plain, fused = pair(nn.Sequential(norm(), nn.ReLU()))
    for each in (plain, fused):
        each.append(nn.Tanh())
        each[1] = nn.GELU()
    assert_same(plain, fused)
    assert calls(fused) == 0


def test_training_and_evaluation_that_differ():
    def forward(self, x):
        y = F.relu(self.norm(x))
        return y * 2 if self.training else y

    plain, fused = pair(module_of(forward, norm=norm()).eval())
    assert calls(copy.deepcopy(fused).train()) == 1 and calls(copy.deepcopy(fused).eval()) == 0
    assert_same(plain.train(), fused.train())


@pytest.mark.parametrize("other", [nn.GELU(), nn.LeakyReLU(0.3), nn.Identity(), nn.SiLU()])
def test_another_activation(other):
    """Also one that could be fused alone, but not with a residual."""
    plain, fused = fused_block()
    for each in (plain, fused):
        each.act = other
    assert_same(plain, fused)
    assert calls(fused) == isinstance(other, nn.SiLU)  # of the two sites the one without a residual


def test_what_returned_its_input_and_then_does_not():
    """An identity between norm and sum, and one that the branch's call is moved past."""

    def forward(self, x):
        y = self.branch(x)
        return F.relu(self.drop(y) + self.shortcut(x))

    branch = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 1), norm())
    model = module_of(forward, branch=branch, drop=nn.Identity(), shortcut=nn.Identity())
    plain, fused = pair(model)
    assert calls(copy.deepcopy(fused)) == 1
    assert_same(plain, fused)
    for name in ("drop", "shortcut"):
        ours, theirs = copy.deepcopy(fused), copy.deepcopy(plain)
        for each in (ours, theirs):
            setattr(each, name, nn.Dropout(0.5))  # the random numbers must come in the same order too
        assert_same(theirs, ours)
        assert calls(ours) == 0
    for each in (plain, fused):
        each.drop.register_forward_hook(lambda module, arguments, y: y * 2)
    assert_same(plain, fused)


def test_a_residual_that_broadcasts_or_has_another_dtype():
    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + self.pool(x))

    model = module_of(forward, conv=nn.Conv2d(4, 4, 1), norm=norm(), pool=nn.AdaptiveAvgPool2d(1))
    plain, fused = pair(model)
    assert brn.fusion_report(fused).counts() == {"norm + add + act": 1} and calls(copy.deepcopy(fused)) == 0
    assert_same(plain, fused)
    model = module_of(lambda self, x: self.norm(x.float()) + x, norm=norm())
    plain, fused = copy.deepcopy(model), brn.fuse(copy.deepcopy(model))
    assert fused(images()).dtype == torch.float64
    torch.testing.assert_close(fused(images()), plain(images()))


def test_adding_in_place_never_writes_where_the_model_did_not():
    def forward(self, x):
        x += self.norm(x)
        return F.relu(x)

    plain, fused = pair(module_of(forward, norm=norm()))
    assert not brn.fusion_report(fused).fused
    x, y = images(), images()
    plain.eval()(x), fused.eval()(y)
    assert torch.equal(x, y) and not torch.equal(x, images())


# Hooks


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("name", ["norm1", "act", "shortcut.1", "shortcut", ""])
def test_hooks_see_what_they_saw(name, kind, when):
    model = Block(nn.Sequential(nn.Conv2d(4, 4, 1), norm())).double()

    def register(each):
        getattr(each.get_submodule(name), f"register_{kind}_hook")(lambda module, *seen: each.__dict__["seen"].append(
            [t.detach().clone() for part in seen for t in (part if isinstance(part, tuple) else (part,))]
        ))  # fmt: skip

    fused = copy.deepcopy(model)
    for each in (model, fused):
        each.__dict__["seen"] = []
    if when == "before":
        register(fused)
    brn.fuse(fused)
    if when == "after":
        register(fused)
    register(model)
    # an in-place activation writes into what the model's hooks were shown: compare copies only
    for each in (model, fused):
        each.act.inplace = False
    assert_same(model, fused)
    assert len(model.__dict__["seen"]) == len(fused.__dict__["seen"]) > 0
    for seen, expected in zip(fused.__dict__["seen"], model.__dict__["seen"], strict=True):
        for ours, theirs in zip(seen, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_hook_that_replaces_the_output_of_a_norm():
    plain, fused = fused_block()
    for each in (plain, fused):
        each.norm1.register_forward_hook(lambda module, arguments, y: y * 2)
    assert_same(plain, fused)
    assert calls(fused) == 1


def test_hooks_on_all_modules():
    plain, fused = fused_block()
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: names.append(type(module).__name__))
    try:
        fused(images())
    finally:
        handle.remove()
    assert names.count("ReLU") == 2


def test_a_patched_norm_is_left_alone():
    plain, fused = fused_block()
    for each in (plain, fused):
        each.norm2.forward = lambda x: x * 2
    assert_same(plain, fused)


# Forwards that must not be traced

RECENT = []


def sets_itself(self, x):
    self.last = self.norm(x)
    return F.relu(self.last)


def appends(self, x):
    self.seen.append(1)
    return F.relu(self.norm(x))


def draws_torchs(self, x):
    return F.relu(self.norm(x)) if torch.rand(()) < 2 else x


def draws_pythons(self, x):
    return F.relu(self.norm(x)) if random.random() < 2 else x


def without_gradient(self, x):
    with torch.no_grad():
        y = F.relu(self.norm(x))
    return y + x


def recomputes(self, x):
    return checkpoint(lambda x: F.relu(self.norm(x)), x, use_reentrant=False)


def moves_what_it_saves(self, x):
    with torch.autograd.graph.save_on_cpu():
        return F.relu(self.norm(x))


def under_autocast(self, x):
    with torch.autocast("cpu"):
        return F.relu(self.norm(x))


def asks_the_shape(self, x):
    return F.relu(self.norm(x)) if x.shape[0] > 1 else x


def asks_for_grad_mode(self, x):
    return F.relu(self.norm(x)) if torch.is_grad_enabled() else x


def takes_anything(self, *x):
    return F.relu(self.norm(*x))


def reads_an_object(self, x):
    return F.relu(self.norm(x)) if self.config.fast else x


def raises(self, x):
    raise RuntimeError("not today")


REFUSED = {
    sets_itself: "its forward sets 'last'", appends: "its forward changes a list", draws_torchs: "calls rand",
    draws_pythons: "random numbers of Python", without_gradient: "asks for grad", recomputes: "",
    moves_what_it_saves: "hooks on saved tensors",
    under_autocast: "", asks_the_shape: "symbolically traced", asks_for_grad_mode: "asks for grad",
    takes_anything: "takes *x", reads_an_object: "reads 'config'", raises: "not today",
}  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED, ids=lambda forward: forward.__name__)
def test_forwards_that_cannot_be_traced_are_left(forward):
    model = module_of(forward, norm=norm())
    model.seen, model.config = [], type("Config", (), {"fast": True})()
    states = torch.get_rng_state(), random.getstate()
    fused = brn.fuse(copy.deepcopy(model))
    report = brn.fusion_report(fused)
    assert not report.fused and REFUSED[forward] in report.left[0].reason and report.left[0].reason, str(report)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert type(fused) is type(model) and fused.seen == [] and not hasattr(fused, "last")
    assert "__getattribute__" not in vars(nn.Module)


def test_what_is_not_ours_to_change_is_left():
    class Mine(nn.BatchNorm2d):
        pass

    relu = nn.ReLU()
    patched = nn.Sequential(norm(), relu)
    patched.forward = lambda x: x
    cases = {
        "a subclass of BatchNorm not known here": nn.Sequential(Mine(4), relu),
        "is lazy": nn.Sequential(nn.LazyBatchNorm2d(), relu),
        "its forward has been patched": patched,
        "has an activation of its own": nn.Sequential(brn.BatchRenorm2d(4, activation="silu"), relu),
        "eps": nn.Sequential(nn.BatchNorm2d(4, eps=0), relu),
    }
    for why, model in cases.items():
        types = [type(module) for module in model.modules()]
        (left,) = brn.fusion_report(brn.fuse(model)).left
        assert why in left.reason, (why, left)
        assert [type(module) for module in model.modules()] == types


def test_a_compiled_model_is_left():
    model = torch.compile(nn.Sequential(norm(), nn.ReLU()), backend="eager")
    (left,) = brn.fusion_report(brn.fuse(model)).left
    assert left.reason == "compiled as it is" and type(model._orig_mod) is nn.Sequential
    inner = nn.Sequential(nn.Sequential(norm(), nn.ReLU()))
    inner[0].compile(backend="eager")
    assert not brn.fusion_report(brn.fuse(inner)).fused
