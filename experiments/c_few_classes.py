"""Claim c: where batches are not iid BatchNorm breaks, Batch Renormalization does not."""

from .candidates import BN, JUDGED
from .common import Experiment, Job, Judgement, jobs_of, values
from .figures import curves
from .images import NETWORK, OPTIMIZER, Condition, trained
from .verdicts import every, interval, less, more

BREAKS = 2.0  # points of accuracy
IID = "iid 32"
CONDITIONS = (
    Condition(IID, 32, 10, 1200, 0.05),
    Condition("32 of 2 classes", 32, 2, 1200, 0.05),
    Condition("32 of 1 class", 32, 1, 1200, 0.05),
)
NAMES = [condition.name for condition in CONDITIONS]


def judge(rows):
    """What each loses against its own training with iid batches."""
    found = []
    for name in NAMES[1:]:
        lost = {who: interval(list(values(rows, IID, who) - values(rows, name, who))) for who in (BN, *JUDGED)}
        breaks = more(lost[BN], BREAKS, negligible=0)
        for who, words in JUDGED.items():
            verdict = every([breaks, less(lost[who], BREAKS)])
            statement = f"{words}: in batches of {name} BatchNorm breaks and BRN does not"
            found.append(Judgement(statement, f"BN loses {lost[BN]}, BRN {lost[who]}", verdict, headline=True))
    return found


def run(job: Job, progress):
    return trained(CONDITIONS, job, progress)[1]


EXPERIMENT = Experiment(
    claim="With batches of few classes BatchNorm breaks, Batch Renormalization does not",
    source="Ioffe 2017, section 4.3 (16 classes a batch: BatchNorm 67 %, Batch Renormalization 78.5 %)",
    setup=f"{NETWORK}; {OPTIMIZER}, learning rate 0.05; batches of 32 from 10, 2 or 1 classes drawn anew; 1,200 steps",
    rule=f"BN, 0.1 loses more than {BREAKS:g} points of its test accuracy with iid batches, Batch Renormalization less",
    limits="classes are drawn anew for each batch, so that the next one may hold others",
    jobs=lambda quick: jobs_of([(c.name, c.steps) for c in CONDITIONS], quick),
    run=run,
    judge=judge,
    draw=curves(NAMES),
)
