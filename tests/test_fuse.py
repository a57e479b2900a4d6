"""``fuse``: what it finds, that nothing but the speed changes, and that no later change makes it wrong."""

import copy
import io
import pickle
import random
import warnings

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn
from brn_kernels.modules import BatchRenorm

OPEN = brn.ClipSchedule.constant(3, 5)


class Block(nn.Module):
    """A residual block, whose activation serves twice."""

    def __init__(self, shortcut=None):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = shortcut
        self.scale = 1.0

    def forward(self, x, skip=False):
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        if skip:
            return y
        y += x * self.scale if self.scale != 1.0 else x
        return self.act(y)


def module_of(function, **layers):
    """Of a class of its own, as forwards are written."""
    kind = type("Written", (nn.Module,), {"forward": function})
    module = kind()
    for name, layer in layers.items():
        setattr(module, name, layer)
    return module


def norm(channels=4):
    return nn.BatchNorm2d(channels)


def images(batch=4, channels=4):
    return torch.randn(batch, channels, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5


def results(model, x=None, seed=0, call=None):
    """Output, gradients and statistics of a step, then the output in evaluation."""
    x = (images() if x is None else x).clone().requires_grad_()
    torch.manual_seed(seed)
    y = (call or model)(x)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    found = [y.detach().clone(), x.grad, *(g.clone() for g in grads), *(v.clone() for v in model.state_dict().values())]
    mode = model.training
    with torch.no_grad():
        found.append((call or model).eval()(x) if call is None else model.eval()(x))
    model.train(mode).zero_grad()
    return found


def assert_same(model, fused, **keywords):
    for ours, expected in zip(results(fused, **keywords), results(model, **keywords), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def calls(model, **keywords):
    """How many calls of norms did something more, in one forward: what was fused there and then."""
    count = 0
    forward = BatchRenorm.forward

    def counted(self, x, residual=None, mask=None, *, activation=None):
        nonlocal count
        count += residual is not None or activation is not None
        return forward(self, x, residual, mask, activation=activation)

    BatchRenorm.forward = counted
    plain = BatchRenorm.ends_with_normalization
    BatchRenorm.ends_with_normalization = lambda self: self.activation is None
    try:
        model(keywords.pop("x", images()), **keywords)
    finally:
        BatchRenorm.forward, BatchRenorm.ends_with_normalization = forward, plain
    return count


def pair(model, renorm=False):
    """The model in float64, as BatchNorm or with open limits, and a fused copy."""
    torch.manual_seed(0)
    model = copy.deepcopy(model).double()
    if renorm:
        brn.convert_batchnorm(model, schedule=OPEN, momentum=0.3)
    for layer in model.modules():
        if isinstance(layer, (BatchRenorm, nn.BatchNorm2d)) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model, brn.fuse(copy.deepcopy(model))


def check(model, counts, renorm=None, **keywords):
    """Fused and not, as BatchNorm and with open limits: the same results, and so many sites of each kind."""
    for each in (False, True) if renorm is None else (renorm,):
        plain, fused = pair(model, each)
        assert brn.fusion_report(fused).counts() == counts
        assert calls(copy.deepcopy(fused)) == sum(counts.values())
        assert_same(plain, fused, **keywords)
    return fused


SEQUENTIALS = {
    "relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True), "leaky_relu": nn.LeakyReLU(), "silu": nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish(),
}  # fmt: skip


@pytest.mark.parametrize("activation", SEQUENTIALS.values(), ids=SEQUENTIALS)
def test_a_sequential(activation):
    check(nn.Sequential(nn.Conv2d(4, 4, 1), norm(), activation, nn.Conv2d(4, 4, 1), norm()), {"norm + act": 1})


FUNCTIONS = {
    "F.relu": F.relu, "F.relu_": F.relu_, "torch.relu": torch.relu, "torch.relu_": torch.relu_,
    "x.relu": lambda x: x.relu(), "x.relu_": lambda x: x.relu_(), "F.silu": F.silu, "F.hardswish": F.hardswish,
    "F.leaky_relu": F.leaky_relu, "F.leaky_relu 0.01": lambda x: F.leaky_relu(x, 0.01, inplace=True),
    "F.relu inplace": lambda x: F.relu(x, inplace=True), "F.relu True": lambda x: F.relu(x, True),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function(function):
    check(module_of(lambda self, x: function(self.norm(x)), norm=norm()), {"norm + act": 1})


ADDITIONS = {
    "y + x": lambda y, x: y + x, "x + y": lambda y, x: x + y, "torch.add": torch.add, "y.add": lambda y, x: y.add(x),
    "y.add_": lambda y, x: y.add_(x),
}  # fmt: skip


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
def test_an_addition(add):
    check(module_of(lambda self, x: F.relu(add(self.norm(x), x)), norm=norm()), {"norm + add + act": 1})
    check(module_of(lambda self, x: add(self.norm(x), x), norm=norm()), {"norm + add": 1})


def test_an_addition_then_another_activation_is_two_calls():
    check(module_of(lambda self, x: F.silu(self.norm(x) + x), norm=norm()), {"norm + add": 1})


def test_a_residual_block():
    check(Block(), {"norm + act": 1, "norm + add + act": 1})


def test_of_two_norms_added_one_takes_the_other():
    """The last one called is fused: the shortcut's, at the end of a branch."""
    fused = check(Block(nn.Sequential(nn.Conv2d(4, 4, 1), norm())), {"norm + act": 1, "norm + add + act": 1})
    (left,) = brn.fusion_report(fused).left
    assert left.norm == "norm2" and left.reason == "added to the result of another norm, which is fused"


def test_adding_into_the_result_of_another_norm():
    def forward(self, x):
        y = self.a(x)
        y += self.b(x)
        return F.relu(y)

    check(module_of(forward, a=norm(), b=norm()), {"norm + add + act": 1})


def test_adding_into_another_dtype_keeps_that():
    def forward(self, x):
        y = self.a(x.float())
        y += self.b(x)
        return F.relu(y)

    model = module_of(forward, a=norm(), b=norm().double())
    plain, fused = copy.deepcopy(model), brn.fuse(copy.deepcopy(model))
    assert brn.fusion_report(fused).counts() == {"norm + add + act": 1}
    assert fused(images()).dtype == plain(images()).dtype == torch.float32
    torch.testing.assert_close(fused(images()), plain(images()))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 1), norm(), nn.Identity()
        self.extra = None

    def forward(self, x):
        x = self.drop(self.norm(self.conv(x)))
        return x if self.extra is None else self.extra(x)


def test_branches_that_end_with_a_norm():
    branch = nn.Sequential(nn.Conv2d(4, 4, 1), norm(), nn.ReLU(), nn.Sequential(nn.Dropout(0.5), Branch()))

    def forward(self, x):
        return F.relu(x + self.branch(x))

    model = module_of(forward, branch=branch)
    fused = check(model, {"norm + act": 1, "norm + add + act": 1})
    assert [row.owner for row in brn.fusion_report(fused).fused] == ["branch", ""]
    fused.branch[3][1].extra = nn.Tanh()  # a child, later
    plain = copy.deepcopy(fused)
    brn.unfuse(plain)
    assert_same(plain, fused)
    assert calls(fused) == 1


def test_a_u_net_like_sum_of_a_norm_and_an_upsampled_branch_may_wait():
    """The norm's call moves behind that of the other branch, which neither writes nor uses what it reads."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.relu(y + self.other(x))

    check(module_of(forward, conv=nn.Conv2d(4, 4, 1), norm=norm(), other=nn.Conv2d(4, 4, 1)), {"norm + add + act": 1})


def written_between(self, x):
    v = x.mul(1)[:, :4]
    y = self.norm(v)
    v.mul_(2)
    return F.relu(y + x)


def aliased_between(self, x):
    h = x * 1
    y = self.norm(h[:, :4])
    h.mul_(2)
    return F.relu(y + x)


def random_between(self, x):
    y = self.branch(x)
    return F.relu(y + F.dropout(x, 0.5, True))


def shared_between(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + self.norm(self.conv2(x)).sigmoid())


LEFT = {  # forward, why, and how many are fused all the same
    "used twice": (lambda self, x: F.relu(y := self.norm(x)) + y, "output of it used 2 times"),
    "convolution": (lambda self, x: self.conv(self.norm(x)), "followed by Conv2d"),
    "own sum": (lambda self, x: (y := self.norm(x)) + y, "followed by add"),
    "another slope": (lambda self, x: F.leaky_relu(self.norm(x), 0.2), "followed by leaky_relu"),
    "relu6": (lambda self, x: F.relu6(self.norm(x)), "followed by relu6"),
    "alpha": (lambda self, x: torch.add(self.norm(x), x, alpha=2), "followed by add"),
    "number": (lambda self, x: self.norm(x) + 1, "followed by add"),
    "last": (lambda self, x: self.norm(x), "last in the model"),
    "not used": (lambda self, x: (self.norm(x), x * 1)[1], "output of it not used"),
    "not called": (lambda self, x: self.conv(x), "not called by the model"),
    "drop path": (lambda self, x: self.drop(self.norm(x)) + x, "followed by Dropout2d"),
    "keyword": (lambda self, x: F.relu(self.norm(input=x)), "it is called with other arguments"),
}


@pytest.mark.parametrize("forward, why", LEFT.values(), ids=LEFT)
def test_what_is_left_and_why(forward, why):
    model = module_of(forward, norm=norm(), conv=nn.Conv2d(4, 4, 1), drop=nn.Dropout2d(0.5))
    plain, fused = pair(model)
    report = brn.fusion_report(fused)
    assert not report.fused and [row.norm for row in report.left] == ["norm"], str(report)
    assert type(fused) is type(plain) and type(fused.norm) is nn.BatchNorm2d
    assert why in report.left[0].reason
    assert_same(plain, fused)


@pytest.mark.parametrize("forward", [written_between, aliased_between])
def test_a_norm_whose_input_is_written_before_the_addition_is_left(forward):
    plain, fused = pair(module_of(forward, norm=norm()))
    assert not brn.fusion_report(fused).fused
    with torch.no_grad():
        assert torch.equal(plain.eval()(images()), fused.eval()(images()))


def test_a_branch_does_not_pass_what_may_draw_random_numbers():
    plain, fused = pair(module_of(random_between, branch=nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 1), norm())))
    assert not brn.fusion_report(fused).fused
    assert_same(plain, fused)


def test_a_norm_called_twice_keeps_the_order_of_its_updates():
    model = module_of(shared_between, norm=norm(), conv=nn.Conv2d(4, 4, 1), conv2=nn.Conv2d(4, 4, 1))
    plain, fused = pair(model)
    assert_same(plain, fused)


def test_a_shared_norm_is_fused_at_each_call():
    def forward(self, x):
        return F.relu(self.norm(self.act(self.norm(x))) + x)

    plain, fused = pair(module_of(forward, norm=norm(), act=nn.ReLU()))
    assert len(brn.fusion_report(fused).fused) == 1 and calls(copy.deepcopy(fused)) == 2
    assert_same(plain, fused)


# What a trace bakes in, changed afterwards


def fused_block(**keywords):
    plain, fused = pair(Block(**keywords))
    assert calls(copy.deepcopy(fused)) == 2
    return plain, fused


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
