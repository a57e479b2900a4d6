"""Claim e: on small data sets BatchNorm is better."""

from .common import Experiment, Job, jobs_of, judge_each
from .figures import curves
from .images import NETWORK, OPTIMIZER, Condition, trained
from .verdicts import more

CONDITIONS = tuple(Condition(f"{count} images", 16, 10, 600, 0.05, images=count) for count in (50, 150, 400))
NAMES = [condition.name for condition in CONDITIONS]


def run(job: Job, progress):
    return trained(CONDITIONS, job, progress)[1]


EXPERIMENT = Experiment(
    claim="Small data sets make Batch Renormalization's statistics unreliable, so BatchNorm is better",
    source="opinion, often repeated",
    setup=f"{NETWORK}; {OPTIMIZER}, learning rate 0.05; 50, 150 or 400 images to train on, iid batches of 16; "
    "600 steps",
    rule="test accuracy of BN, 0.1 above that of Batch Renormalization, for every number of images",
    limits="trainings of one length; the images are the same for all seeds",
    jobs=lambda quick: jobs_of([(c.name, c.steps) for c in CONDITIONS], quick),
    run=run,
    judge=lambda rows: judge_each(rows, NAMES, "BatchNorm is better", more, sign=-1),
    draw=curves(NAMES),
)
