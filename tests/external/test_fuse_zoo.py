"""``fuse`` on whole models of torchvision and timm, and on plain U-Nets: the same model, so many sites of each kind.

The numbers are counted by hand from the architectures; each comment says how.
"""

import contextlib
import copy
import time

import pytest
import torch
from torch import nn

import brn_kernels as brn
from bench import networks
from bench.saved_bytes import SavedBytes

OPEN = brn.ClipSchedule.constant(3, 5)


def counts(act=0, add_act=0, add=0):
    named = {"norm + act": act, "norm + add + act": add_act, "norm + add": add}
    return {kind: count for kind, count in named.items() if count}


# A block of a stage that changes the shape has a norm in its shortcut too: of the two that are added one is fused, and
# the other, its residual, is left.
TORCHVISION = {
    "resnet18": (counts(1 + 8, 8), 3),  # the stem's and the first of 8 blocks; 8 sums; 3 shortcuts
    "resnet50": (counts(1 + 2 * 16, 16), 4),  # 16 blocks of 3 norms; 4 shortcuts
    "resnext50_32x4d": (counts(1 + 2 * 16, 16), 4),
    "wide_resnet50_2": (counts(1 + 2 * 16, 16), 4),
    "regnet_y_400mf": (counts(1 + 2 * 16, 16), 4),  # 1 + 3 + 6 + 6 blocks
    "regnet_x_400mf": (counts(1 + 2 * 22, 22), 4),  # 1 + 2 + 7 + 12 blocks
    # 1 + 2 + 2 + 3 + 3 + 4 + 1 = 16 blocks, of 2 activated norms but the first, which has 1; stem and head. The last
    # norm of each of the 16 is left: stochastic depth comes before the sum, or there is no sum.
    "efficientnet_b0": (counts(1 + 1 + 15 * 2 + 1), 16),
    # ReLU6 is not fused. Of 17 blocks those that neither stride nor widen add: 1 + 2 + 3 + 2 + 2.
    "mobilenet_v2": (counts(add=10), 52 - 10),
    # 11 blocks of 2 activated norms but the first, which has 1; stem and head; 6 keep stride and width, 5 do not
    "mobilenet_v3_small": (counts(1 + 1 + 10 * 2 + 1, add=6), 5),
    "densenet121": (counts(1 + 2 * (6 + 12 + 24 + 16) + 3 + 1), 0),  # stem, layers, transitions, the last
    "googlenet": (counts(3 + 9 * 6), 0),  # a stem of 3, 9 inceptions of 6 convolutions
    "inception_v3": (counts(94), 0),  # every one of its 94 convolutions
    # stem of 3 norms, the third not activated; 3 + 3 + 3 + 2 + 4 + 1 = 16 blocks of 3 norms, the last of them not
    # activated; head. 16 - 6 first blocks add.
    "mnasnet0_5": (counts(2 + 16 * 2 + 1, add=10), 1 + 6),
    # stem, head; 16 blocks of 2 in the branch, 3 of which have 1 more in the other. The depthwise one is not activated.
    "shufflenet_v2_x0_5": (counts(1 + 1 + 16 * 2 + 3), 16 + 3),
}
TIMM = {
    "resnet18": (counts(1 + 8, 8), 3),
    "resnet26d": (counts(3 + 2 * 8, 8), 4),  # a stem of 3
    "resnext26ts": (counts(3 + 2 * 8, add=8), 4),  # SiLU: not fused with the sum
    "regnety_002": (counts(1 + 2 * 13, 13), 4),  # 1 + 1 + 4 + 7 blocks
    "efficientnet_b0": (counts(1 + 1 + 15 * 2 + 1, add=9), 7),  # no drop path by default: 16 - 7 first blocks add
    # 1 + 2 + 5 + 3 blocks as torchvision's, and a last 1x1 convolution; the 1st has no sum in either
    "mobilenetv3_small_050": (counts(1 + 1 + 10 * 2 + 1, add=7), 4),
    "densenet121": (counts(1 + 2 * (6 + 12 + 24 + 16) + 3 + 1), 0),
    "resnetv2_18": (counts(2 * 8 + 1), 0),  # before the convolutions: every one is activated, and the last
    # 3 layers of one norm, 12 blocks of 2, the second added; 4 shortcuts; 6 roots, whose forward takes a list
    "dla34": (counts(3 + 12, 12), 4 + 6),
    "res2net50_26w_4s": (counts(1 + 16 * (1 + 3), 16), 4),  # of a block: the first, and those of 3 splits
}


def randomized(model):
    """In float64; scales away from 0, where timm starts some, and from one another."""
    torch.manual_seed(0)
    for module in model.double().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


def results(model, x):
    """Output, gradients and buffers of a training step, and then the output in evaluation."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # dropout and stochastic depth
    y = model.train()(x)
    y = y if isinstance(y, torch.Tensor) else y.logits
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2)))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found = {"output": y.detach(), "input": x.grad, **model.state_dict(), "evaluation": model.eval()(x)}
    return found, gradients


def check(model, expected, size=64, batch=2):
    counts, left = expected
    randomized(model)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    types = [type(m) for m in model.modules()]
    x = torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for renorm in (False, True):
        plain = copy.deepcopy(model)
        if renorm:
            brn.convert_batchnorm(plain, schedule=OPEN)
        fused = brn.fuse(copy.deepcopy(plain))
        report = brn.fusion_report(fused)
        assert report.counts() == counts and len(report.left) == left, str(report)
        assert sorted(row.norm for row in (*report.fused, *report.left)) == sorted(norms)
        assert list(fused.state_dict()) == list(plain.state_dict())
        (ours, gradients), (theirs, expected_gradients) = results(fused, x), results(plain, x)
        largest = max(g.abs().max().item() for g in expected_gradients.values())
        assert gradients.keys() == expected_gradients.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9 * max(1, value.abs().max()), msg=name)
        for name, value in expected_gradients.items():  # some are zero but for rounding: the largest sets the scale
            torch.testing.assert_close(gradients[name], value, rtol=1e-9, atol=1e-9 * largest, msg=name)
        if not renorm:
            assert [type(m) for m in brn.unfuse(fused).modules()] == types
        else:
            assert [type(m) for m in brn.revert_to_batchnorm(fused).modules()] == types
            with torch.no_grad():
                torch.testing.assert_close(fused.eval()(x), theirs["evaluation"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(torchvision, name):
    keywords = {"num_classes": 5}
    if name in ("googlenet", "inception_v3"):
        keywords |= {"aux_logits": False, "init_weights": False}
    check(getattr(torchvision.models, name)(**keywords), TORCHVISION[name], size=75 if name == "inception_v3" else 64)


@pytest.mark.parametrize("name", TIMM)
def test_timm(timm, name):
    check(timm.create_model(name, num_classes=5), TIMM[name])


class UNet(nn.Module):
    """As it is commonly written: double convolutions, halved and doubled resolution, skips concatenated."""

    def __init__(self, dimensions):
        super().__init__()
        conv, norm, pool, up = (
            getattr(nn, f"{name}{dimensions}d") for name in ("Conv", "BatchNorm", "MaxPool", "ConvTranspose")
        )

        def double(i, o):
            parts = (conv(i, o, 3, padding=1), norm(o), nn.ReLU(True), conv(o, o, 3, padding=1), norm(o), nn.ReLU(True))
            return nn.Sequential(*parts)

        self.down = nn.ModuleList([double(3, 4), double(4, 8)])
        self.pool, self.middle = pool(2), double(8, 16)
        self.up = nn.ModuleList([up(16, 8, 2, stride=2), up(8, 4, 2, stride=2)])
        self.out = nn.ModuleList([double(16, 8), double(8, 4)])
        self.head = conv(4, 5, 1)

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = self.pool(skips[-1])
        x = self.middle(x)
        for up, block in zip(self.up, self.out, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_u_net(dimensions):
    model = randomized(UNet(dimensions))
    x = torch.randn(2, 3, *[8] * dimensions, dtype=torch.float64)
    for renorm in (False, True):
        plain = brn.convert_batchnorm(copy.deepcopy(model), schedule=OPEN) if renorm else copy.deepcopy(model)
        fused = brn.fuse(copy.deepcopy(plain))
        assert brn.fusion_report(fused).counts() == counts(5 * 2)  # 5 double convolutions
        for ours, theirs in zip(results(fused, x), results(plain, x), strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_timms_norm_with_an_activation_of_its_own(timm):
    """It is a site by itself, as long as nothing watches or replaces its activation."""
    kind = timm.layers.BatchNormAct2d
    model = nn.Sequential(
        kind(3, act_layer=nn.SiLU), kind(3, drop_layer=nn.Dropout), kind(3, act_layer=nn.GELU)
    ).double()
    plain, fused = copy.deepcopy(model), brn.fuse(copy.deepcopy(model))
    report = brn.fusion_report(fused)
    assert [row.norm for row in report.fused] == ["0"] and fused[0].fusible_activation() == "silu"
    assert [row.reason for row in report.left] == ["followed by its own Dropout", "followed by its own GELU"]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def check_again():
        for ours, theirs in zip(results(copy.deepcopy(fused), x), results(copy.deepcopy(plain), x), strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=name)

    check_again()
    for each in (plain, fused):
        each[0].act = nn.Tanh()
    check_again()
    for each in (plain, fused):
        each[0].act = nn.ReLU()
        each[0].act.register_forward_hook(lambda module, arguments, y: y * 2)
    check_again()
    assert [type(m) for m in brn.unfuse(fused)] == [kind] * 3 and "fuses_activation" not in vars(fused[0])


def test_densenet_that_recomputes_is_left(torchvision):
    """Its layers run again in the backward, by a call that a fused forward would lose."""
    model = torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5, memory_efficient=True)
    plain = randomized(model)
    fused = brn.fuse(copy.deepcopy(plain))
    report = brn.fusion_report(fused)
    assert report.counts() == counts(3) and all("memory_efficient" in row.reason for row in report.left)
    assert len(report.left) == 2 * 4
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)


def test_fusing_a_large_model_takes_seconds_at_most(torchvision):
    model = torchvision.models.resnet152(num_classes=5)
    start = time.perf_counter()
    brn.fuse(model)
    assert time.perf_counter() - start < 10  # 0.4 s on one core of 2026
    assert brn.fusion_report(model).counts() == counts(1 + 2 * 50, 50)


def kept_bytes(model, x, recomputing=False):
    around = brn.recompute_activations() if recomputing else contextlib.nullcontext()
    with SavedBytes(model) as kept, around:
        y = model(x)
    size = kept.bytes
    del y
    return size


@pytest.mark.parametrize("fused_from", ["BatchNorm", "Batch Renorm"])
@pytest.mark.parametrize(
    "name, at_most", [("resnet50", 0.85), ("resnet18", 0.77), ("efficientnet_b0", 0.6), ("U-Net", 0.6)]
)
def test_a_fused_model_that_recomputes_keeps_less(torchvision, name, at_most, fused_from):
    model = networks.UNet(2, 3, 16, 4) if name == "U-Net" else getattr(torchvision.models, name)()
    x = torch.randn(2, 3, 64, 64)
    before = kept_bytes(model, x)
    if fused_from == "Batch Renorm":
        brn.convert_batchnorm(model, schedule=OPEN)
    brn.fuse(model)
    assert kept_bytes(model, x, recomputing=True) <= at_most * before
