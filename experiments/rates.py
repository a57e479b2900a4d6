"""``python -m experiments.rates``: which learning rate suits BatchNorm in each way of composing batches of images."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pandas as pd
import torch
from tqdm import tqdm

from . import a_iid_batches, b_small_batches, c_few_classes
from .candidates import BN, CANDIDATES
from .common import ACCURACY, Job, Row
from .images import Condition, initial, train
from .record import RESULTS, about

RATES = (0.01, 0.02, 0.05, 0.1)
SEEDS = tuple(range(100, 104))  # not those of the experiments
STEPS = 500
MODULES = (a_iid_batches, b_small_batches, c_few_classes)


def conditions() -> dict[str, Condition]:
    """Every composition once."""
    found: dict[tuple[int, int, int], Condition] = {}
    for module in MODULES:
        for condition in module.CONDITIONS:
            found.setdefault((condition.batch, condition.classes, condition.images), condition)
    return {condition.name: replace(condition, steps=STEPS) for condition in found.values()}


def measure(name: str, rate: float) -> list[Row]:
    torch.set_num_threads(1)
    condition = replace(conditions()[name], rate=rate)
    job = Job(name, BN, SEEDS, STEPS)
    rows = train(CANDIDATES[BN].put_into(initial(SEEDS), STEPS), condition, job, lambda: None)
    last = [row["value"] for row in rows if row["measure"] == ACCURACY and row["x"] == STEPS]
    return [{"condition": name, "rate": rate, "seed": seed, "value": v} for seed, v in zip(SEEDS, last, strict=True)]


def main() -> int:
    pairs = [(name, rate) for name in conditions() for rate in RATES]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(measure, *zip(*pairs, strict=True))
        rows = [row | about() for some in tqdm(found, total=len(pairs)) for row in some]
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "rates.csv", index=False, float_format="%.6g")
    print(table.pivot_table("value", "condition", "rate", sort=False).round(2).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
