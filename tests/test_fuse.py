"""``fuse``: what it finds and what it leaves."""

import copy

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
from fuse_models import SEQUENTIALS, Block, assert_same, calls, check, images, module_of, norm, pair
from torch import nn

import brn_kernels as brn


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
