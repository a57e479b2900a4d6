"""Claim g: networks with gates do not suit Batch Renormalization."""

from functools import partial

import torch
import torch.nn.functional as F

from .candidates import CANDIDATES
from .common import ACCURACY, Experiment, Job, jobs_of, judge_each, named
from .figures import curves
from .gates import CLASSES, HIDDEN, Recurrent
from .images import OPTIMIZER, POINTS_OF_CURVES, Condition, batches_of, by_seed, digits, initial
from .verdicts import more

STEPS, BATCH, RATE = 600, 16, 0.1
CONDITIONS = {
    "LSTM, pooled over time": ("LSTM", False, False),
    "LSTM, per time step": ("LSTM", True, False),
    "GRU, pooled over time": ("GRU", False, False),
    "GRU, per time step": ("GRU", True, False),
    "LSTM, pooled, masked": ("LSTM", False, True),
    "GRU, per time step, masked": ("GRU", True, True),
}  # kind, normalized per step, padded


def mask_of(count: int, padded: bool):
    """Of every second sequence the last 1, 2 or 3 rows are padding; so every step has values enough for statistics."""
    if not padded:
        return None
    order = torch.arange(count)
    lengths = 8 - torch.where(order % 2 == 1, order // 2 % 3 + 1, 0)
    return torch.arange(8) < lengths[:, None]


def run(job: Job, progress):
    kind, per_step, padded = CONDITIONS[job.condition]
    model = initial(job.seeds, partial(Recurrent, kind, per_step))
    named(CANDIDATES, job.candidate).put_into(model, job.steps, masked=padded)
    images, labels, test_images, test_labels = digits()
    seeds = len(job.seeds)
    tests = test_images.squeeze(1).mT.repeat(1, seeds, 1)  # row t is step t, its 8 pixels are the features
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    mask, test_mask = mask_of(BATCH, padded), mask_of(len(tests), padded)
    measured = {round(job.steps * k / POINTS_OF_CURVES) for k in range(1, POINTS_OF_CURVES + 1)}
    rows = []
    batches = batches_of(labels, Condition("iid", BATCH, 10, job.steps, RATE), job.steps, job.seeds)
    for step, batch in enumerate(batches, start=1):
        logits = model(images[batch, 0].mT.flatten(1, 2), mask).view(-1, CLASSES)
        loss = F.cross_entropy(logits, labels[batch].flatten()) * seeds
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)  # by value: seeds stay independent
        optimizer.step()
        decay.step()
        if step in measured:
            with torch.no_grad():
                found = model.eval()(tests, test_mask).view(-1, seeds, CLASSES).argmax(2) == test_labels[:, None]
            model.train()
            rows += by_seed(job, ACCURACY, step, (100 * found.float().mean(0)).tolist())
        progress()
    return rows


EXPERIMENT = Experiment(
    claim="Networks with gates (LSTM, GRU) do not suit Batch Renormalization",
    source="opinion: its corrections would shift what gates are sensitive to",
    setup=f"digits as sequences of 8 rows, LSTM and GRU of {HIDDEN} units; what comes from the input is normalized, "
    "with statistics of each time step or pooled over all; masked: the last 1 to 3 rows of every second sequence are "
    f"padding that the layer's mask leaves out (BN there: our layer with closed limits); {OPTIMIZER}, learning rate "
    f"{RATE}, gradients clipped at 1; {STEPS} iid batches of {BATCH}",
    rule="test accuracy of BN, 0.1 above that of Batch Renormalization in every variant",
    limits="sequences of 8 steps; what comes from the hidden state is not normalized",
    jobs=lambda quick: jobs_of([(name, STEPS) for name in CONDITIONS], quick),
    run=run,
    judge=lambda rows: judge_each(rows, list(CONDITIONS), "BatchNorm is better", more, sign=-1),
    draw=curves(list(CONDITIONS)),
)
