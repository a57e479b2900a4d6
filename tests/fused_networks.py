"""Networks with BatchNorm and separate activations, and the same with layers that do both."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import brn_kernels as brn
from bench.networks import import_torchvision

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.LeakyReLU: "leaky_relu"}
SCHEDULE = brn.ClipSchedule.constant(1.5, 0.5)


def layer_of(norm, activation=None):
    return brn.BatchRenorm2d(norm.num_features, norm.eps, schedule=SCHEDULE, activation=activation)


def fuse_sequences(model):
    """Every norm of an ``nn.Sequential`` becomes ours, with the activation behind it, if there is one."""
    for child in model.children():
        fuse_sequences(child)
    if isinstance(model, nn.Sequential):
        for i, layer in enumerate(model):
            if isinstance(layer, nn.BatchNorm2d):
                behind = model[i + 1] if i + 1 < len(model) else None
                model[i] = layer_of(layer, ACTIVATIONS.get(type(behind)))
                if type(behind) in ACTIVATIONS:
                    model[i + 1] = nn.Identity()
    return model


class Block(nn.Module):
    """A block of a torchvision ResNet, two or three convolutions."""

    def __init__(self, block):
        super().__init__()
        self.convs = nn.ModuleList([c for name, c in block.named_children() if name.startswith("conv")])
        norms = [n for name, n in block.named_children() if name.startswith("bn")]
        self.norms = nn.ModuleList([layer_of(norm, "relu") for norm in norms])
        self.downsample = None if block.downsample is None else fuse_sequences(block.downsample)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        h = x
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            h = norm(conv(h))
        return self.norms[-1](self.convs[-1](h), residual=shortcut)


def torchvision_models():
    try:
        return import_torchvision().models
    except ImportError as error:
        pytest.skip(str(error))


def resnet(name, fused):
    model = getattr(torchvision_models(), name)(weights=None, num_classes=10)
    if fused:
        model.bn1, model.relu = layer_of(model.bn1, "relu"), nn.Identity()
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for i, block in enumerate(stage):
                stage[i] = Block(block)
    return model


def efficientnet(fused):
    model = torchvision_models().efficientnet_b0(weights=None, num_classes=10)
    return fuse_sequences(model) if fused else model


def convolutions(i, o):
    return nn.Sequential(
        nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """The plain one (Ronneberger 2015, with BatchNorm and padding): pooling down, transposed convolutions up."""

    def __init__(self, width=8, depth=4):
        super().__init__()
        widths = [width << k for k in range(depth + 1)]
        self.down = nn.ModuleList([convolutions(i, o) for i, o in zip([3, *widths], widths, strict=False)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1])])
        self.joined = nn.ModuleList([convolutions(2 * w, w) for w in reversed(widths[:-1])])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        skips = []
        for k, block in enumerate(self.down):
            x = block(x if k == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.joined, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def unet(fused):
    return fuse_sequences(UNet()) if fused else UNet()


NETWORKS = {
    "resnet50": lambda fused: resnet("resnet50", fused),
    "resnet18": lambda fused: resnet("resnet18", fused),
    "efficientnet_b0": efficientnet,
    "unet": unet,
}
