"""Claim j: fine-tuning from a BatchNorm checkpoint at small batch goes better with Batch Renormalization."""

import copy
from functools import lru_cache

from torch.nn.modules.batchnorm import _NormBase

from .candidates import BN, CANDIDATES
from .common import Experiment, Job, jobs_of, judge_each, named
from .figures import curves
from .images import NETWORK, OPTIMIZER, Condition, digits, initial, train
from .verdicts import more

PRETRAINING = Condition("iid 32", 32, 10, 800, 0.05)
CONDITIONS = (Condition("fine-tuned, batch 8", 8, 10, 600, 0.01), Condition("fine-tuned, batch 2", 2, 10, 600, 0.005))
NAMES = [condition.name for condition in CONDITIONS]


@lru_cache
def pretrained(seeds: tuple[int, ...], steps: int):
    """The BatchNorm network that all candidates start from."""
    model = CANDIDATES[BN].put_into(initial(seeds), steps)
    train(model, PRETRAINING, Job(PRETRAINING.name, BN, seeds, steps), lambda: None)
    return model


def run(job: Job, progress):
    condition = CONDITIONS[NAMES.index(job.condition)]
    model = copy.deepcopy(pretrained(job.seeds, 4 if job.steps < condition.steps else PRETRAINING.steps))
    for layer in model.modules():
        if isinstance(layer, _NormBase):
            layer.num_batches_tracked.zero_()  # the schedule is that of the fine-tuning
    named(CANDIDATES, job.candidate).put_into(model, job.steps)
    images, labels, test_images, test_labels = digits()
    return train(model, condition, job, progress, (images.flip(3), labels, test_images.flip(3), test_labels))


EXPERIMENT = Experiment(
    claim="Fine-tuning from a BatchNorm checkpoint at small batch goes better with Batch Renormalization",
    source="practice: detection and segmentation fine-tune at batches of 1 to 8",
    setup=f"{NETWORK}, trained for 800 steps of 32 with BN, 0.1, then fine-tuned on mirrored digits for 600 steps of 8 "
    f"or 2; {OPTIMIZER}, learning rate 0.01 or 0.005; num_batches_tracked set to 0, so that limits open anew",
    rule="test accuracy on mirrored digits above that of BN, 0.1, at both batch sizes",
    limits="source and target differ by a mirror only; BatchNorm frozen at its statistics was not run",
    jobs=lambda quick: jobs_of([(c.name, c.steps) for c in CONDITIONS], quick),
    run=run,
    judge=lambda rows: judge_each(rows, NAMES, "better than BatchNorm", more),
    draw=curves(NAMES),
)
