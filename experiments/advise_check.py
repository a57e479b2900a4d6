"""Does brn.advise pick the layer that is better after training? Digits, the network of ``brn demo``, paired seeds.

    python -m experiments.advise_check --seeds 6 --steps 400

Each stream is trained on with BatchNorm (momentum 0.1) and with Batch Renormalization (momentum 0.01 and 0.1,
``ClipSchedule.for_training``; and as advise would set it): same weights and batches in a seed. Test images are
those of the stream's end.
``--advise`` asks for advice on the untrained network and batches spread over the same stream, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from brn_kernels import ClipSchedule, advise, convert_batchnorm
from brn_kernels.advise_rule import BATCH_RENORM, recommend
from brn_kernels.demo import LEARNING_RATE, Setting, accuracy, digits, network
from brn_kernels.demo import batches as draw

RESULTS = Path(__file__).parent / "results" / "advise_check.csv"
ARMS = ("BatchNorm", "BRN, momentum 0.01", "BRN, momentum 0.1", "BRN as advised")


def perceptron() -> nn.Module:
    """(N, 1, 8, 8) images to (N, 10) logits; two normalizations of (N, C), where a sample is one value."""
    hidden = [layer for size in (64, 96) for layer in (nn.Linear(size, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(96, 10))


def unchanged(images: Tensor, progress: float) -> Tensor:
    return images


def drifting(images: Tensor, progress: float) -> Tensor:
    """Brightness and contrast move from those of the digits to others as training goes on."""
    return images * (1 + 2 * progress) + 3 * progress


STREAMS: dict[str, tuple[Setting, Callable[[Tensor, float], Tensor], Callable[[], nn.Module]]] = {
    "iid, batch 64": (Setting("", 64, 10), unchanged, network),
    "iid, batch 32": (Setting("", 32, 10), unchanged, network),
    "iid, batch 8": (Setting("", 8, 10), unchanged, network),
    "iid, batch 4": (Setting("", 4, 10), unchanged, network),
    "iid, batch 2": (Setting("", 2, 10), unchanged, network),
    "2 classes in a batch of 32": (Setting("", 32, 2), unchanged, network),
    "1 class in a batch of 32": (Setting("", 32, 1), unchanged, network),
    "drift, batch 32": (Setting("", 32, 10), drifting, network),
    "drift, batch 4": (Setting("", 4, 10), drifting, network),
    "MLP: iid, batch 64": (Setting("", 64, 10), unchanged, perceptron),
    "MLP: iid, batch 16": (Setting("", 16, 10), unchanged, perceptron),
    "MLP: iid, batch 8": (Setting("", 8, 10), unchanged, perceptron),
    "MLP: iid, batch 4": (Setting("", 4, 10), unchanged, perceptron),
    "MLP: iid, batch 2": (Setting("", 2, 10), unchanged, perceptron),
    "MLP: 2 classes in a batch of 32": (Setting("", 32, 2), unchanged, perceptron),
    "MLP: 1 class in a batch of 32": (Setting("", 32, 1), unchanged, perceptron),
    "MLP: drift, batch 32": (Setting("", 32, 10), drifting, perceptron),
}


def convert(model: nn.Module, arm: str, stream: str, steps: int) -> None:
    """Make the model's BatchNorm layers what the arm says."""
    if arm == "BRN as advised":
        found = advise(model, spread_batches(stream, steps, seed=0))
        limits = recommend(BATCH_RENORM, found.overall, False, steps)
        schedule = replace(ClipSchedule.for_training(steps), r_max=limits.r_max, d_max=limits.d_max)
        convert_batchnorm(model, schedule=schedule, momentum=limits.momentum)
    elif arm != "BatchNorm":
        convert_batchnorm(model, schedule=ClipSchedule.for_training(steps), momentum=float(arm.split()[-1]))


def train(stream: str, arm: str, seed: int, steps: int, data: tuple[Tensor, ...]) -> float:
    """Test accuracy in percent, normalized by running statistics."""
    images, labels, test_images, test_labels = data
    setting, change, make = STREAMS[stream]
    torch.manual_seed(seed)
    model = make()
    convert(model, arm, stream, steps)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, batch in enumerate(draw(labels, setting, steps, torch.Generator().manual_seed(seed))):
        optimizer.zero_grad()
        F.cross_entropy(model(change(images[batch], step / steps)), labels[batch]).backward()
        optimizer.step()
        decay.step()
    return accuracy(model, change(test_images, 1.0), test_labels)


def run(seeds: int, steps: int, only: str) -> None:
    """Train what the results do not hold yet, a row at a time."""
    data = digits()
    RESULTS.parent.mkdir(exist_ok=True)
    header = ["stream", "arm", "seed", "steps", "accuracy"]
    done = {tuple(row[:4]) for row in csv.reader(RESULTS.open())} if RESULTS.exists() else set()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(header)
        for seed in range(seeds):
            for stream in [name for name in STREAMS if only in name]:
                for arm in ARMS:
                    if (stream, arm, str(seed), str(steps)) not in done:
                        writer.writerow([stream, arm, seed, steps, f"{train(stream, arm, seed, steps, data):.3f}"])
                        file.flush()


def spread_batches(stream: str, steps: int, seed: int) -> list[Tensor]:
    """48 batches of the stream, evenly spread over the training, in its order."""
    images, labels, _, _ = digits()
    setting, change, _ = STREAMS[stream]
    every = max(1, steps // 48)
    drawn = draw(labels, setting, steps, torch.Generator().manual_seed(seed))
    return [change(images[batch], k / steps) for k, batch in enumerate(drawn) if k % every == 0][:48]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", default="", help="streams with this in their names")
    parser.add_argument("--advise", action="store_true", help="print the table of results and advice")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.seeds, arguments.steps, arguments.only)
    if arguments.advise:
        print(table(arguments.steps))


def table(steps: int) -> str:
    """Per stream: accuracies, the paired difference of the better BRN arm with its standard error, and the advice."""
    rows = [row for row in csv.DictReader(RESULTS.open()) if int(row["steps"]) == steps]
    lines = []
    for stream in STREAMS:
        found = {(row["arm"], row["seed"]): float(row["accuracy"]) for row in rows if row["stream"] == stream}
        if not found:
            continue
        batchnorm = [accuracy for (arm, _), accuracy in found.items() if arm == "BatchNorm"]
        line = [stream, f"{statistics.fmean(batchnorm):.2f}"]
        for arm in ARMS[1:]:
            seeds = [seed for a, seed in found if a == arm and ("BatchNorm", seed) in found]
            if len(seeds) < 2:
                line.append("not run")
                continue
            differences = [found[arm, seed] - found["BatchNorm", seed] for seed in seeds]
            error = statistics.stdev(differences) / math.sqrt(len(seeds))
            line.append(f"{statistics.fmean(differences):+.2f} ± {error:.2f}")
        torch.manual_seed(0)
        line.append(advise(STREAMS[stream][2](), spread_batches(stream, steps, seed=0)).choice)
        lines.append(line)
    headers = ["stream", "BatchNorm, %", *(f"{arm}: points" for arm in ARMS[1:]), "advice"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
