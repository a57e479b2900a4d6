"""Claim b: with small batches Batch Renormalization is better."""

from .common import Experiment, Job, jobs_of, judge_each
from .figures import curves
from .images import NETWORK, OPTIMIZER, Condition, trained
from .verdicts import more

CONDITIONS = (Condition("iid 4", 4, 10, 2000, 0.1), Condition("iid 2", 2, 10, 2000, 0.02))
NAMES = [condition.name for condition in CONDITIONS]


def run(job: Job, progress):
    return trained(CONDITIONS, job, progress)[1]


EXPERIMENT = Experiment(
    claim="With batches of 4 and of 2, Batch Renormalization is better than BatchNorm",
    source="Ioffe 2017, section 4.2 (ImageNet, groups of 4: 76.5 % against 74.2 %)",
    setup=f"{NETWORK}; {OPTIMIZER}, learning rate 0.1 at batch 4 and 0.02 at batch 2; 2,000 steps",
    rule="test accuracy above that of BN, 0.1, at both batch sizes",
    limits="2,000 small batches are few epochs: running statistics that lag weigh more than in a long training",
    jobs=lambda quick: jobs_of([(c.name, c.steps) for c in CONDITIONS], quick),
    run=run,
    judge=lambda rows: judge_each(rows, NAMES, "better than BatchNorm", more),
    draw=curves(NAMES),
)
