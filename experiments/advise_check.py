"""Does brn.advise pick the layer that is better after training? Digits, the network of ``brn demo``, paired seeds.

    python -m experiments.advise_check --seeds 6 --steps 400

Each stream is trained on with BatchNorm (momentum 0.1) and with Batch Renormalization (momentum 0.01 and 0.1,
``ClipSchedule.for_training``): same weights and batches in a seed. Test images are those of the stream's end. ``--advise``
asks for advice on the untrained network and on batches spread over the same stream, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from brn_kernels import ClipSchedule, convert_batchnorm
from brn_kernels.demo import LEARNING_RATE, Setting, accuracy, digits, network
from brn_kernels.demo import batches as draw

RESULTS = Path(__file__).parent / "results" / "advise_check.csv"
ARMS = {"BatchNorm": None, "BRN, momentum 0.01": 0.01, "BRN, momentum 0.1": 0.1}


def unchanged(images: Tensor, progress: float) -> Tensor:
    return images


def drifting(images: Tensor, progress: float) -> Tensor:
    """Brightness and contrast move from those of the digits to others as training goes on."""
    return images * (1 + 2 * progress) + 3 * progress


STREAMS: dict[str, tuple[Setting, Callable[[Tensor, float], Tensor]]] = {
    "iid, batch 64": (Setting("", 64, 10), unchanged),
    "iid, batch 32": (Setting("", 32, 10), unchanged),
    "iid, batch 8": (Setting("", 8, 10), unchanged),
    "iid, batch 4": (Setting("", 4, 10), unchanged),
    "iid, batch 2": (Setting("", 2, 10), unchanged),
    "2 classes in a batch of 32": (Setting("", 32, 2), unchanged),
    "1 class in a batch of 32": (Setting("", 32, 1), unchanged),
    "drift, batch 32": (Setting("", 32, 10), drifting),
    "drift, batch 4": (Setting("", 4, 10), drifting),
}


def train(stream: str, momentum: float | None, seed: int, steps: int, data: tuple[Tensor, ...]) -> float:
    """Test accuracy in percent, normalized by running statistics."""
    images, labels, test_images, test_labels = data
    setting, change = STREAMS[stream]
    torch.manual_seed(seed)
    model = network()
    if momentum is not None:
        convert_batchnorm(model, schedule=ClipSchedule.for_training(steps), momentum=momentum)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, batch in enumerate(draw(labels, setting, steps, torch.Generator().manual_seed(seed))):
        optimizer.zero_grad()
        F.cross_entropy(model(change(images[batch], step / steps)), labels[batch]).backward()
        optimizer.step()
        decay.step()
    return accuracy(model, change(test_images, 1.0), test_labels)


def run(seeds: int, steps: int) -> None:
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
            for stream in STREAMS:
                for arm, momentum in ARMS.items():
                    if (stream, arm, str(seed), str(steps)) not in done:
                        writer.writerow([stream, arm, seed, steps, f"{train(stream, momentum, seed, steps, data):.3f}"])
                        file.flush()


def spread_batches(stream: str, steps: int, seed: int) -> list[Tensor]:
    """48 batches of the stream, evenly spread over the training, in its order."""
    images, labels, _, _ = digits()
    setting, change = STREAMS[stream]
    every = max(1, steps // 48)
    drawn = draw(labels, setting, steps, torch.Generator().manual_seed(seed))
    return [change(images[batch], k / steps) for k, batch in enumerate(drawn) if k % every == 0][:48]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--advise", action="store_true", help="print the table of results and advice")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.seeds, arguments.steps)
    if arguments.advise:
        print(table(arguments.steps))


def table(steps: int) -> str:
    """Per stream: accuracies, the paired difference of the better BRN arm with its standard error, and the advice."""
    from tabulate import tabulate

    from brn_kernels import advise

    rows = [row for row in csv.DictReader(RESULTS.open()) if int(row["steps"]) == steps]
    lines = []
    for stream in STREAMS:
        found = {(row["arm"], row["seed"]): float(row["accuracy"]) for row in rows if row["stream"] == stream}
        means = {arm: statistics.fmean(v for (a, _), v in found.items() if a == arm) for arm in ARMS}
        line = [stream, f"{means['BatchNorm']:.2f}"]
        for arm in list(ARMS)[1:]:
            seeds = sorted(seed for a, seed in found if a == arm)
            differences = [found[arm, seed] - found["BatchNorm", seed] for seed in seeds]
            error = statistics.stdev(differences) / math.sqrt(len(seeds))
            line.append(f"{statistics.fmean(differences):+.2f} ± {error:.2f}")
        torch.manual_seed(0)
        line.append(advise(network(), spread_batches(stream, steps, seed=0)).choice)
        lines.append(line)
    headers = ["stream", "BatchNorm, %", *(f"{arm}: points" for arm in list(ARMS)[1:]), "advice"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
