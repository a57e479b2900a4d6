"""Training on scikit-learn's digits, all seeds side by side.

The networks of all seeds are one network whose convolutions are grouped by seed. Normalization is by channel and the
optimizer by element, so that they do not see each other, and a step costs little more than that of one of them: these
networks are so small that time goes into the calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from brn_kernels.demo import Residual, Setting, batches, digits

from .candidates import CANDIDATES, Candidate
from .common import ACCURACY, Job, Row, named

WIDTH = 8
POINTS_OF_CURVES = 20
NETWORK = f"residual network of 5 normalizations, {WIDTH} and {2 * WIDTH} channels, on scikit-learn's digits (8 x 8)"
OPTIMIZER = "SGD, momentum 0.9, weight decay 1e-4, cosine decay"

digits = lru_cache(digits)


@dataclass(frozen=True)
class Condition:
    """How batches are composed and how long a training is. ``rate`` is the learning rate that suits BatchNorm."""

    name: str
    batch: int
    classes: int
    steps: int
    rate: float
    images: int = 1200

    @property
    def composed(self) -> Setting:
        return Setting(self.name, self.batch, self.classes)


def network(seeds: int) -> nn.Module:
    """(N, seeds, 8, 8) images to (N, seeds * 10) logits; seeds do not see each other."""
    channels = seeds * WIDTH
    stem = [nn.Conv2d(seeds, channels, 3, padding=1, bias=False, groups=seeds), nn.BatchNorm2d(channels), nn.ReLU()]
    blocks = [Residual(channels, channels, 1, seeds), Residual(channels, 2 * channels, 2, seeds)]
    head = nn.Conv2d(2 * channels, 10 * seeds, 1, groups=seeds)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), head, nn.Flatten())


def initial(seeds: tuple[int, ...], make: Callable[[int], nn.Module] = network) -> nn.Module:
    """``make(len(seeds))`` with the weights of each seed drawn from it alone."""
    model = make(len(seeds))
    for place, seed in enumerate(seeds):
        torch.manual_seed(seed)
        own = dict(make(1).named_parameters())
        for name, parameter in model.named_parameters():
            rows = parameter.data.unflatten(0, (len(seeds), -1))
            rows[place] = own[name].data
    return model


def batches_of(labels: Tensor, condition: Condition, steps: int, seeds: tuple[int, ...]) -> Iterator[Tensor]:
    """Indices (batch, seeds), each seed's own."""
    streams = [batches(labels, condition.composed, steps, torch.Generator().manual_seed(seed)) for seed in seeds]
    return (torch.stack(columns, dim=1) for columns in zip(*streams, strict=True))


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(seeds,) cross entropies of (N, seeds, 8, 8) images and (N, seeds) labels."""
    logits = model(images).unflatten(1, (labels.shape[1], -1)).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels).mean(0)


@torch.no_grad()
def accuracies(model: nn.Module, images: Tensor, labels: Tensor, seeds: int) -> list[float]:
    """Percent right of each seed, normalized by running statistics."""
    model.eval()
    right = model(images.expand(-1, seeds, -1, -1)).unflatten(1, (seeds, 10)).argmax(2) == labels[:, None]
    model.train()
    return (100 * right.float().mean(0)).tolist()


def train(
    model: nn.Module,
    condition: Condition,
    job: Job,
    progress: Callable[[], None],
    data: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> list[Row]:
    """Train ``model`` in place: accuracies on the test images along the way, and all losses.

    ``data``: training images and labels, then those to test on; digits unless given.
    """
    images, labels, test_images, test_labels = data or digits()
    images, labels = images[: condition.images], labels[: condition.images]
    optimizer = torch.optim.SGD(model.parameters(), condition.rate, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    measured = {round(job.steps * k / POINTS_OF_CURVES) for k in range(1, POINTS_OF_CURVES + 1)}
    rows: list[Row] = []
    losses = []
    for step, batch in enumerate(batches_of(labels, condition, job.steps, job.seeds), start=1):
        loss = loss_of(model, images[batch, 0], labels[batch])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        decay.step()
        losses.append(loss.detach())
        if step in measured:
            rows += by_seed(job, ACCURACY, step, accuracies(model, test_images, test_labels, len(job.seeds)))
            rows += by_seed(job, "largest training loss", step, torch.stack(losses).amax(0).tolist())
            losses = []
        progress()
    return rows


def by_seed(job: Job, measure: str, x: float, numbers: list[float]) -> list[Row]:
    """A row of each seed."""
    return [
        {"measure": measure, "x": x, "seed": seed, "value": number}
        for seed, number in zip(job.seeds, numbers, strict=True)
    ]


def trained(conditions: tuple[Condition, ...], job: Job, progress: Callable[[], None]) -> tuple[nn.Module, list[Row]]:
    """The usual job: train a new network in a condition with a candidate."""
    condition = next(each for each in conditions if each.name == job.condition)
    candidate: Candidate = named(CANDIDATES, job.candidate)
    model = candidate.put_into(initial(job.seeds), job.steps)
    return model, train(model, condition, job, progress)


@torch.no_grad()
def gaps(model: nn.Module, condition: Condition, seeds: tuple[int, ...], count: int = 20) -> list[list[float]]:
    """How differently each layer behaves in training and in evaluation, in percent: layers of seeds; logits come last.

    Of ``count`` batches in training mode: the root mean square of (output - what evaluation makes of the same input)
    over that of the latter. The model is left as it was.
    """
    model = copy.deepcopy(model).train()
    frozen = copy.deepcopy(model).eval()
    images, labels, *_ = digits()
    layers = [layer for layer in model.modules() if isinstance(layer, _NormBase)]
    sums = torch.zeros(len(layers) + 1, 2, len(seeds))

    def add(index: int, output: Tensor, evaluated: Tensor) -> None:
        for k, x in enumerate((output - evaluated, evaluated)):
            sums[index, k] += x.unflatten(1, (len(seeds), -1)).square().movedim(1, 0).flatten(1).mean(1)

    def evaluated(layer: _NormBase, x: Tensor) -> Tensor:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)

    expected: dict[nn.Module, Tensor] = {}  # computed before the layer moves its statistics
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda layer, inputs: expected.update({layer: evaluated(layer, inputs[0])}))
        layer.register_forward_hook(lambda layer, _, output, index=index: add(index, output, expected.pop(layer)))
    unseen = tuple(seed + 10_000 for seed in seeds)
    for batch in batches_of(labels, replace(condition, images=len(labels)), count, unseen):
        add(len(layers), model(images[batch, 0]), frozen(images[batch, 0]))
    return (100 * (sums[:, 0] / sums[:, 1]).sqrt()).tolist()
