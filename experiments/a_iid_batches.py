"""Claim a: with large iid batches Batch Renormalization equals BatchNorm."""

from .common import Experiment, Job, jobs_of, judge_each
from .figures import curves
from .images import NETWORK, OPTIMIZER, Condition, trained
from .verdicts import POINTS, equal

CONDITIONS = (Condition("iid 32, 800 steps", 32, 10, 800, 0.05), Condition("iid 32, 3,000 steps", 32, 10, 3000, 0.05))


def judge(rows):
    short, long = ([condition.name] for condition in CONDITIONS)
    decisive = judge_each(rows, long, "equals BatchNorm in the long training", equal)
    return decisive + judge_each(rows, short, "equals BatchNorm in the short one", equal, headline=False)


def run(job: Job, progress):
    return trained(CONDITIONS, job, progress)[1]


EXPERIMENT = Experiment(
    claim="With batches of 32 drawn iid, Batch Renormalization equals BatchNorm",
    source="Ioffe 2017, section 4.2 (ImageNet: 78.5 % against 78.3 %)",
    setup=f"{NETWORK}; {OPTIMIZER}, learning rate 0.05; batches of 32",
    rule=f"equal within {POINTS:g} points of test accuracy to BN, 0.1; the long training decides",
    limits="one small data set and network, near its ceiling, where differences are small",
    jobs=lambda quick: jobs_of([(c.name, c.steps) for c in CONDITIONS], quick),
    run=run,
    judge=judge,
    draw=curves([condition.name for condition in CONDITIONS]),
)
