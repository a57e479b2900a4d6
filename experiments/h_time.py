"""Claim h: Batch Renormalization costs training time."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import report
from bench.peers import EAGER
from brn_kernels import demo

from .candidates import AUTO, BN, CANDIDATES, PAPER
from .common import Experiment, Job, Judgement, values
from .figures import intervals
from .images import Row
from .verdicts import Interval, interval, more

RECORDED = Path(report.__file__).parent / "results"
EXTRA = "time of a step beyond BatchNorm's, %"
HERE = "digits, batch 32"
COMPARED = (BN, PAPER, AUTO)
NEGLIGIBLE = 2.0  # percent


def run(job: Job, progress) -> list[Row]:
    """Networks take turns; a "seed" is a block of turns, whose medians are compared."""
    images, labels, *_ = demo.digits()
    models = {}
    for name in COMPARED:
        torch.manual_seed(0)
        model = CANDIDATES[name].put_into(demo.network(), job.steps)
        models[name] = model, torch.optim.SGD(model.parameters(), 0.01)
    rows = []
    for block in job.seeds:
        spent = {name: [] for name in COMPARED}
        for turn in range(job.steps // len(job.seeds)):
            batch = torch.randint(len(labels), (32,))
            for name in COMPARED[turn % 3 :] + COMPARED[: turn % 3]:
                model, optimizer = models[name]
                start = time.perf_counter()
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                spent[name].append(time.perf_counter() - start)
            progress()
        median = {name: sorted(times)[len(times) // 2] for name, times in spent.items()}
        rows += [
            {"measure": EXTRA, "x": job.steps, "seed": block, "candidate": name, "value": value}
            for name in COMPARED
            if math.isfinite(value := 100 * (median[name] / median[BN] - 1))
        ]
    return rows


def recorded() -> dict[str, Interval]:
    """Of the recorded benchmarks, percent of time beyond eager BatchNorm: layers by network, and whole networks.

    A network that was trained at several sizes counts once: they say much the same.
    """
    found = {}
    for path in sorted(RECORDED.glob("*.csv")):
        rows = report.load(path)
        device = f"{rows.iloc[0].device}, {rows.iloc[0].date}"

        def add(what: str, ratios: Sequence[float], device: str = device) -> None:
            found[f"{device}, {what}, {len(ratios)} networks"] = interval([100 * (1 / ratio - 1) for ratio in ratios])

        layers = report.timed_layers(rows)
        layers = layers[(layers.direction == "both") & layers.candidate.str.startswith(EAGER)]
        if len(layers):
            by_net = layers.groupby("net", sort=False)
            means = [report.geometric_mean(list(of.ratio), list(of["count"])) for _, of in by_net]
            add("layers alone", means)
        networks = report.networks(rows)
        for (mode, name), ratios in networks.groupby(["mode", "candidate"], sort=False) if len(networks) else ():
            if name.startswith("brn_kernels") and "recomputing" not in name:
                sizes = [list(of) for _, of in ratios["x BatchNorm"].groupby("net", sort=False)]
                add(f"training, {mode}, {name}", [report.geometric_mean(of, [1] * len(of)) for of in sizes])
    return found


def judge(rows):
    def judged(statement: str, of: Interval, headline: bool) -> Judgement:
        return Judgement(f"{statement}: more time than BatchNorm", f"{of} %", more(of, 0, NEGLIGIBLE), headline)

    found = [judged(statement, of, True) for statement, of in recorded().items()]
    return found + [
        judged(f"{HERE}, {name}", interval(list(values(rows, HERE, name, EXTRA))), False) for name in (PAPER, AUTO)
    ]


EXPERIMENT = Experiment(
    claim="Batch Renormalization costs training time",
    source="opinion: it adds computation",
    setup="what `brn bench` recorded ([benchmarks](benchmarks.md)): forward and backward of the layers of each network "
    "against eager BatchNorm, and training steps of whole networks; and the network of `brn demo`, batches of 32, one "
    "thread of a CPU on which other work may run, turn by turn",
    rule="a training step takes longer than with BatchNorm, over the networks of a device and mode "
    f"({NEGLIGIBLE:g} % is negligible)",
    limits="a small network on a CPU is bound by the calls, not by the computation",
    jobs=lambda quick: [Job(HERE, "all in turns", tuple(range(2 if quick else 10)), 6 if quick else 500)],
    run=run,
    judge=judge,
    draw=intervals([HERE], EXTRA),
    table=EXTRA,
)
