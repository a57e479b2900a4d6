"""``fuse``: what had gone wrong once, each named after its failure."""

import pytest
import torch
import torch.nn.functional as F
from fuse_models import assert_same, module_of, norm
from torch import nn
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn


def conv():
    return nn.Conv2d(4, 4, 3, padding=1)


def both(build):
    """The same model twice, the second fused."""
    torch.manual_seed(0)
    model = build().double()
    torch.manual_seed(0)
    return model, brn.fuse(build().double())


def adding(branch):
    return lambda: module_of(lambda self, x: self.act(x + self.branch(x)), branch=branch(), act=nn.ReLU())


def with_shared(layer, *after):
    def build():
        shared = layer()
        return nn.Sequential(conv(), norm(), shared, conv(), shared, norm(), *after)

    return build


@pytest.mark.parametrize("layer", [nn.ReLU, nn.Tanh, conv], ids=["ReLU", "Tanh", "Conv2d"])
def test_a_module_that_occurs_twice_in_a_branch_was_called_once(layer):
    assert_same(*both(adding(with_shared(layer))))


def test_the_activation_that_ends_an_inner_sequential_was_lost():
    def build():
        act = nn.SiLU()
        return nn.Sequential(nn.Sequential(conv(), act, conv(), norm(), act), nn.SiLU(), conv(), norm(), nn.ReLU())

    assert_same(*both(build))


def test_a_module_appended_again_after_fusing_was_dropped():
    model, fused = both(adding(with_shared(nn.Tanh)))
    for each in (model, fused):
        each.branch.append(each.branch[1])
    assert_same(model, fused)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -dy


@torch.jit.script
def doubled(x):
    return 2 * x


@pytest.mark.parametrize(
    "last",
    [Reversal.apply, doubled, lambda y: checkpoint(torch.tanh, y, use_reentrant=True)],
    ids=["Function", "script", "checkpoint"],
)
def test_a_function_in_cpp_ended_the_process(last):
    def build():
        return module_of(lambda self, x: last(F.relu(self.norm(self.conv(x)))), conv=conv(), norm=norm())

    model, fused = both(build)
    assert not brn.fusion_report(fused).fused
    assert_same(model, fused)


def test_a_scripted_child_was_an_attribute_error():
    model, fused = both(lambda: nn.Sequential(conv(), norm(), nn.ReLU(), torch.jit.script(conv())))
    assert brn.fusion_report(fused).counts() == {"norm + act": 1}
    assert_same(model, fused)
    brn.revert_to_batchnorm(brn.convert_batchnorm(brn.unfuse(fused)))
    assert type(fused[1]) is nn.BatchNorm2d


def test_an_attribute_that_came_after_fusing_was_not_seen():
    """As ``switch_to_deploy`` of RepVGG does it."""

    def forward(self, x):
        if hasattr(self, "deployed"):
            return self.act(self.deployed(x))
        return self.act(self.branch(x) + x)

    def build():
        return module_of(forward, branch=nn.Sequential(conv(), norm()), act=nn.ReLU())

    model, fused = both(build)
    assert brn.fusion_report(fused).counts() == {"norm + add + act": 1}
    assert_same(model, fused)
    torch.manual_seed(2)
    model.deployed = fused.deployed = conv().double()
    del fused.branch
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))


def test_a_norm_shared_with_what_it_passed_updated_its_statistics_in_another_order():
    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + self.branch(x)

    def build():
        shared = norm()
        return module_of(forward, norm=shared, conv=conv(), branch=nn.Sequential(shared, nn.Tanh()))

    assert_same(*both(build))


def test_statistics_read_after_the_norm_were_those_of_before():
    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + torch.tanh(x) * self.norm.running_mean.view(1, -1, 1, 1)

    assert_same(*both(lambda: module_of(forward, norm=norm(), conv=conv())))


def test_a_container_that_wrote_into_a_view_of_the_norms_input_came_first():
    def forward(self, x):
        y = self.conv(x)
        view = y.view_as(y)
        z = self.norm(y)
        return z + self.branch(view)

    def build():
        branch = nn.Sequential(nn.ReLU(inplace=True), nn.Tanh())
        return module_of(forward, norm=norm(), conv=conv(), branch=branch).eval()

    model, fused = both(build)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


def test_a_users_own_drop_path_was_taken_for_timms():
    class DropPath(nn.Module):
        drop_prob = 0.0

        def forward(self, x):
            return 3 * x

    assert_same(*both(lambda: nn.Sequential(conv(), norm(), DropPath(), nn.ReLU())))
