"""Claim f: on streams that change, BatchNorm is better."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .candidates import CANDIDATES
from .common import PREQUENTIAL, Experiment, Job, jobs_of, judge_each, named
from .figures import curves
from .images import by_seed, initial
from .verdicts import more

STEPS, BATCH, FEATURES, CLASSES, HIDDEN, RATE = 2000, 16, 16, 5, 32, 0.02
WINDOW = STEPS // 20
ONLINE = "accuracy in the last steps, %"
STILL = "no drift"
STREAMS = {  # what happens to every input after it was drawn, by step
    STILL: "nothing",
    "slow drift": "each feature's offset walks by 0.01 a step",
    "fast drift": "each feature's offset walks by 0.1 a step",
    "jumps": "every 300 steps each feature gets a new offset (deviation 2) and scale (1/2 to 2)",
    "classes in turn": "every 100 steps two other classes are all there is",
}
DRIFTING = [name for name in STREAMS if name != STILL]


def network(seeds: int) -> nn.Module:
    """(N, seeds * FEATURES, 1) to (N, seeds * CLASSES, 1); seeds do not see each other."""

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Conv1d(inputs * seeds, outputs * seeds, 1, groups=seeds)

    hidden = [
        layer
        for inputs in (FEATURES, HIDDEN)
        for layer in (linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN * seeds), nn.ReLU())
    ]
    return nn.Sequential(*hidden, linear(HIDDEN, CLASSES))


def stream(name: str, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """Inputs (steps, BATCH, FEATURES) and labels (steps, BATCH)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(CLASSES, (steps, BATCH), generator=generator)
    if name == "classes in turn":
        pairs = torch.stack([torch.randperm(CLASSES, generator=generator)[:2] for _ in range(steps // 100 + 1)])
        labels = pairs[torch.arange(steps) // 100].gather(1, labels % 2)
    centres = normal(CLASSES, 2, FEATURES)  # two clusters a class
    inputs = centres[labels, torch.randint(2, (steps, BATCH), generator=generator)] + normal(steps, BATCH, FEATURES)
    offset, scale = torch.zeros(steps, 1, FEATURES), torch.ones(steps, 1, FEATURES)
    if name.endswith("drift") and name != STILL:
        offset = (0.1 if name == "fast drift" else 0.01) * normal(steps, 1, FEATURES).cumsum(0)
    if name == "jumps":
        part = torch.arange(steps) // 300
        offset = 2 * normal(steps // 300 + 1, 1, FEATURES)[part]
        scale = 2 ** (2 * torch.rand(steps // 300 + 1, 1, FEATURES, generator=generator) - 1)[part]
    return inputs * scale + offset, labels


def run(job: Job, progress):
    """Each batch is predicted in evaluation mode before it is trained on."""
    streams = [stream(job.condition, seed, job.steps) for seed in job.seeds]
    inputs = torch.stack([inputs for inputs, _ in streams], dim=2).flatten(2)[..., None]
    labels = torch.stack([labels for _, labels in streams], dim=2)
    model = named(CANDIDATES, job.candidate).put_into(initial(job.seeds, network), job.steps)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    right = torch.zeros(job.steps, len(job.seeds))
    for step in range(job.steps):
        with torch.no_grad():
            predicted = model.eval()(inputs[step]).view(BATCH, len(job.seeds), CLASSES)
        right[step] = 100 * (predicted.argmax(2) == labels[step]).float().mean(0)
        logits = model.train()(inputs[step]).view(-1, CLASSES)
        loss = F.cross_entropy(logits, labels[step].flatten()) * len(job.seeds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress()
    rows = by_seed(job, PREQUENTIAL, job.steps, right.mean(0).tolist())
    for part in right.split(WINDOW):
        at = sum(row["measure"] == ONLINE for row in rows) // len(job.seeds) * WINDOW + len(part)
        rows += by_seed(job, ONLINE, at, part.mean(0).tolist())
    return rows


def judge(rows):
    drifting = judge_each(rows, DRIFTING, "BatchNorm is better", more, sign=-1, measure=PREQUENTIAL)
    still = judge_each(rows, [STILL], "BatchNorm is better without drift", more, -1, False, PREQUENTIAL)
    return drifting + still


EXPERIMENT = Experiment(
    claim="On streams that change (drift, online learning), BatchNorm is better",
    source="opinion: running statistics lag behind the stream",
    setup=f"generated streams, {FEATURES} features, {CLASSES} classes of two clusters; perceptron with two hidden "
    f"layers of {HIDDEN}, normalized; {STEPS:,} batches of {BATCH}, SGD with momentum 0.9 and learning "
    f"rate {RATE}, constant. " + "; ".join(f"{name}: {what}" for name, what in STREAMS.items()),
    rule="prequential accuracy (each batch is predicted, normalized by running statistics, before it is trained on; "
    "mean over all steps) of BN, 0.1 above that of Batch Renormalization on every stream that changes",
    limits="generated data; one learning rate; for_training is told the length of the stream, which real ones do not "
    "tell",
    jobs=lambda quick: jobs_of([(name, STEPS) for name in STREAMS], quick),
    run=run,
    judge=judge,
    draw=curves(list(STREAMS), ONLINE, "batch of the stream"),
    table=PREQUENTIAL,
)
