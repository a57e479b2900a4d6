"""Claim d: BatchNorm behaves differently in training and in evaluation, Batch Renormalization less so."""

from .candidates import BN, JUDGED
from .common import Experiment, Job, Judgement, jobs_of, values
from .figures import by_layer
from .images import NETWORK, OPTIMIZER, Condition, by_seed, gaps, trained
from .verdicts import every, interval, more

GAP = "gap, %"
LAYER = "gap of a layer, %"
SEEN = 10.0  # percent: a gap that matters
CONDITIONS = (
    Condition("iid 32", 32, 10, 600, 0.05),
    Condition("iid 4", 4, 10, 600, 0.1),
    Condition("32 of 2 classes", 32, 2, 600, 0.05),
)
NAMES = [condition.name for condition in CONDITIONS]


def run(job: Job, progress):
    model, _ = trained(CONDITIONS, job, progress)
    condition = CONDITIONS[NAMES.index(job.condition)]
    found = gaps(model, condition, job.seeds)
    layers = [row for k, layer in enumerate(found, start=1) for row in by_seed(job, LAYER, k, layer)]
    means = [sum(column) / len(found) for column in zip(*found, strict=True)]
    return layers + by_seed(job, GAP, 0, means)


def judge(rows):
    found = []
    for who, words in JUDGED.items():
        numbers, verdicts = [], []
        for name in NAMES:
            bn, brn = values(rows, name, BN, GAP), values(rows, name, who, GAP)
            verdicts += [more(interval(list(bn)), SEEN, 0), more(interval(list(bn / 2 - brn)), negligible=0)]
            numbers.append(f"{name}: BN {interval(list(bn))}, half of it less BRN's {interval(list(bn / 2 - brn))}")
        statement = f"{words}: BN's gap is above {SEEN:g} %, BRN's less than half of it"
        found.append(Judgement(statement, "; ".join(numbers), every(verdicts), headline=True))
    return found


EXPERIMENT = Experiment(
    claim="BatchNorm's layers behave differently in training and in evaluation; Batch Renormalization closes the gap",
    source="Ioffe 2017, section 3",
    setup=f"{NETWORK}; {OPTIMIZER}, learning rate 0.05 (0.1 at batch 4); 600 steps. Gap of a layer: root mean square "
    "of (training output - evaluation output) over that of the latter, same input, 20 batches composed as in training, "
    "after the last step; the last one is that of the logits of the whole network",
    rule=f"mean over layers and logits: BN, 0.1 above {SEEN:g} %, Batch Renormalization below half of BN's; "
    "all batches",
    limits="a gap is no loss by itself: claims a to c say what it does to accuracy",
    jobs=lambda quick: jobs_of([(c.name, c.steps) for c in CONDITIONS], quick),
    run=run,
    judge=judge,
    draw=by_layer(NAMES, LAYER),
    table=GAP,
)
