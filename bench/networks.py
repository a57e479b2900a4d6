"""The networks that are measured, and what they normalize: ``python -m bench.networks`` writes ``networks.csv``.

Layers are read off the models themselves, run on the meta device; the table is kept so that measuring layers needs
no model zoo.
"""

from __future__ import annotations

import contextlib
import csv
import math
import operator
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, library, nn

TABLE = Path(__file__).with_suffix(".csv")
_operators = []  # defined for torchvision; they go when their library object goes


@dataclass(frozen=True)
class Network:
    """A network as it is trained: samples a batch, and the shape of a sample."""

    build: Callable[[], nn.Module]
    batch: int
    sample: tuple[int, ...]


def import_torchvision() -> ModuleType:
    """torchvision, also beside a torch that its compiled operators do not fit: its models need none of them.

    Raises:
        ImportError: it is not installed.
    """
    with contextlib.suppress(RuntimeError):
        import torchvision

        return torchvision
    for name in list(sys.modules):  # what the first attempt left half imported
        if name.partition(".")[0] == "torchvision":
            del sys.modules[name]
    operators = library.Library("torchvision", "FRAGMENT")
    _operators.append(operators)
    for name in ("nms", "qnms"):  # its import wants their schemas
        with contextlib.suppress(RuntimeError):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision


def _from_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: import_torchvision().models.get_model(name, weights=None)


class UNet(nn.Module):
    """Ronneberger et al. 2015 in ``dims`` dimensions, padded, normalized; ``width`` channels at full resolution."""

    def __init__(self, dims: int, channels_in: int, width: int, levels: int, classes: int = 2) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        transposed = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        widths = [width * 2**level for level in range(levels)]

        def double(inputs: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (inputs, outputs):
                layers += [conv(channels, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(double(i, o) for i, o in zip([channels_in, *widths], widths, strict=False))
        self.pool = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](2)
        self.grow = nn.ModuleList(transposed(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(double(2 * w, w) for w in reversed(widths[:-1]))
        self.head = conv(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, *size) to (N, classes, *size); size divisible by 2 ** (levels - 1)."""
        skipped = []
        for block in self.down[:-1]:
            skipped.append(block(x))
            x = self.pool(skipped[-1])
        x = self.down[-1](x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([skipped.pop(), grow(x)], 1))
        return self.head(x)


NETWORKS = {
    "ResNet-50": Network(_from_torchvision("resnet50"), 256, (3, 224, 224)),
    "ResNeXt-101": Network(_from_torchvision("resnext101_32x8d"), 128, (3, 224, 224)),
    "EfficientNet-B0": Network(_from_torchvision("efficientnet_b0"), 256, (3, 224, 224)),
    "MobileNetV3": Network(_from_torchvision("mobilenet_v3_large"), 256, (3, 224, 224)),
    "DenseNet-121": Network(_from_torchvision("densenet121"), 256, (3, 224, 224)),
    "U-Net 2d": Network(lambda: UNet(2, 3, 64, 5), 16, (3, 512, 512)),
    "U-Net 3d": Network(lambda: UNet(3, 1, 32, 5), 2, (1, 128, 128, 128)),
}
_ACTIVATIONS = {
    nn.ReLU: "relu", F.relu: "relu", nn.SiLU: "silu", F.silu: "silu", nn.Hardswish: "hardswish",
}  # fmt: skip


def normalizations(network: Network) -> Counter[tuple[int, tuple[int, ...], str]]:
    """How often a network has each (channels, size, what follows); of BatchNorm layers that a trace shows."""
    with torch.device("meta"):
        model = network.build().eval()
        graph = fx.symbolic_trace(model)
        found: Counter[tuple[int, tuple[int, ...], str]] = Counter()
        taken: set[fx.Node] = set()
        for node in graph.graph.nodes:
            layer = _module(graph, node)
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                follows = _what_follows(graph, node, taken)

                def count(layer: nn.Module, inputs: tuple[Tensor], y: Tensor, follows: str = follows) -> None:
                    found[y.shape[1], tuple(y.shape[2:]), follows] += 1

                layer.register_forward_hook(count)
        graph(torch.empty(2, *network.sample))
    return found


def _module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _what_follows(graph: fx.GraphModule, node: fx.Node, taken: set[fx.Node]) -> str:
    """What one kernel could do besides normalizing; an addition goes to the first of its two summands."""
    added = False
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in (operator.add, operator.iadd, torch.add) and not added and user not in taken:
            taken.add(user)
            added, node = True, user
            continue
        layer = _module(graph, user)
        activation = _ACTIVATIONS.get(type(layer) if layer is not None else user.target)
        if activation is None:
            break
        return f"add_{activation}" if added else activation
    return "add" if added else "plain"


def main() -> None:
    """Write the table: all distinct normalizations, the largest first."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["net", "batch", "channels", "size", "follows", "count"])
        for name, network in NETWORKS.items():
            found = normalizations(network)
            for (channels, size, follows), count in sorted(
                found.items(), key=lambda item: (-item[0][0] * math.prod(item[0][1]), item[0])
            ):
                writer.writerow([name, network.batch, channels, "x".join(map(str, size)), follows, count])
    print(f"{TABLE} written")


if __name__ == "__main__":
    main()
