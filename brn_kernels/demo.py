"""``brn demo``: BatchNorm against Batch Renormalization on real images, in three settings of the paper.

The images are scikit-learn's handwritten digits (1,797 of 8 x 8 pixels, bundled with it). Both networks of a seed start
from the same weights and see the same batches; only the normalization differs.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from .convert import convert_batchnorm
from .modules import BatchRenorm
from .schedule import ClipSchedule

MOMENTUM = 0.1  # of both: training is too short for the paper's 0.01
LEARNING_RATE = 0.05  # SGD with momentum 0.9, cosine decay
TEST_IMAGES = 597
MEASUREMENTS = 20  # points of the accuracy curves


@dataclass(frozen=True)
class Setting:
    """How training batches are composed: ``batch_size`` images of ``classes`` digits drawn anew for each batch."""

    name: str
    batch_size: int
    classes: int


SETTINGS = (
    Setting("iid, batches of 32", 32, 10),
    Setting("iid, batches of 4", 4, 10),
    Setting("non-iid, batches of 32 from 2 classes", 32, 2),
)
LAYERS = ("BatchNorm", "Batch Renorm")


@dataclass
class Run:
    """What one training gave. Accuracies in percent; ``clipped`` is (measurement, layer), a share since the last."""

    setting: str
    layer: str
    seed: int
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)  # normalized by running statistics, as deployed
    clipped: list[list[float]] = field(default_factory=list)
    batch_accuracy: float = 0.0  # at the end, normalized by the statistics of batches composed as in training
    ms_per_step: float = 0.0


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a shortcut; ``groups`` of channels that do not see each other."""

    def __init__(self, channels_in: int, channels: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False, groups=groups)
        self.norm1 = nn.BatchNorm2d(channels, momentum=MOMENTUM)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=groups)
        self.norm2 = nn.BatchNorm2d(channels, momentum=MOMENTUM)
        shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False, groups=groups)
        self.shortcut = shortcut if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def network() -> nn.Module:
    """(N, 1, 8, 8) images to (N, 10) logits; five normalizations."""
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=MOMENTUM), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (n, 1, 8, 8) and labels (n,), then test images and labels: always the same split."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(bunch.images, dtype=torch.float32)[order, None] - 4.9) / 6.0  # about mean 0, deviation 1
    labels = torch.tensor(bunch.target)[order]
    return images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES]


def batches(labels: Tensor, setting: Setting, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``count`` index tensors, composed as the setting says."""
    for _ in range(count):
        classes = torch.randperm(10, generator=generator)[: setting.classes]
        candidates = torch.isin(labels, classes).nonzero()[:, 0]
        yield candidates[torch.randint(len(candidates), (setting.batch_size,), generator=generator)]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right, normalized by running statistics."""
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return 100 * right


@torch.no_grad()
def batch_accuracy(model: nn.Module, images: Tensor, labels: Tensor, setting: Setting) -> float:
    """Percent right in training mode, on test batches composed as the setting says; the model is left as it was."""
    model = copy.deepcopy(model).train()
    right = [
        (model(images[batch]).argmax(1) == labels[batch]).float().mean().item()
        for batch in batches(labels, setting, 100, torch.Generator().manual_seed(1))
    ]
    return 100 * statistics.fmean(right)


def train(setting: Setting, layer: str, seed: int, steps: int, data: tuple[Tensor, ...], progress: tqdm) -> Run:
    """Train once; everything is drawn from ``seed``, so both layers get the same weights and batches."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    model = network()
    if layer == "Batch Renorm":
        convert_batchnorm(model, schedule=ClipSchedule.for_training(steps), momentum=MOMENTUM)
    renorms = [module for module in model.modules() if isinstance(module, BatchRenorm)]
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run, milliseconds = Run(setting.name, layer, seed), []
    measured = {round(steps * k / MEASUREMENTS) for k in range(1, MEASUREMENTS + 1)}
    clipped = torch.zeros(len(renorms))
    for step, batch in enumerate(batches(labels, setting, steps, torch.Generator().manual_seed(seed)), start=1):
        start = time.perf_counter()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        milliseconds.append(1000 * (time.perf_counter() - start))
        clipped += torch.tensor([layer.clipped.float().mean() for layer in renorms if layer.clipped is not None])
        if step in measured:
            run.clipped.append((clipped / (step - (run.steps[-1] if run.steps else 0))).tolist())
            clipped.zero_()
            run.steps.append(step)
            run.accuracy.append(accuracy(model, test_images, test_labels))
        progress.update()
    run.batch_accuracy = batch_accuracy(model, test_images, test_labels, setting)
    run.ms_per_step = statistics.median(milliseconds)
    return run


def run_demo(seeds: int, steps: int, out: str) -> list[Run]:
    """Train everything, print the table, write figure and numbers into the folder ``out``."""
    from .demo_report import explain, table, write_csv, write_figure

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    data, runs = digits(), []
    print(explain(seeds, steps))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small for more: two take twice as long
    with tqdm(total=len(SETTINGS) * len(LAYERS) * seeds * steps, unit="step", mininterval=1) as progress:
        for seed in range(seeds):
            for setting in SETTINGS:
                for layer in LAYERS:
                    progress.set_description(f"seed {seed}, {setting.name}, {layer}")
                    runs.append(train(setting, layer, seed, steps, data, progress))
        progress.set_description("done")
    torch.set_num_threads(threads)
    print(table(runs))
    write_csv(runs, folder / "demo.csv")
    write_figure(runs, steps, folder / "demo.png")
    print(f"\nFigure: {folder / 'demo.png'}   Numbers: {folder / 'demo.csv'}")
    return runs
