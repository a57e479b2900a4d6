"""Claim k: raising r_max too fast makes the loss spike."""

from brn_kernels import ClipSchedule

from .candidates import AUTO, CANDIDATES, PAPER, Candidate, table
from .common import Experiment, Job, Judgement, jobs_of, named, values
from .figures import curves
from .images import NETWORK, OPTIMIZER, Condition, initial, train
from .verdicts import interval, more

LOSS = "largest training loss"
LARGEST = "largest training loss after the first 5 %"
CONDITION = Condition("iid 32", 32, 10, 1200, 0.05)
AT_ONCE, FAST, SLOWER = "r_max 3 at once", "r_max 3 in 1 % of the steps", "r_max 3 in 50 %"


def ramp(share: float):
    """The paper's schedule with another ramp of r_max."""

    def schedule(steps: int) -> ClipSchedule:
        own = ClipSchedule.for_training(steps)
        return ClipSchedule(own.r_max, own.d_max, own.hold, round(share * steps), own.d_ramp)

    return schedule


RAMPS = table(
    CANDIDATES["BN, 0.01"],
    *(Candidate(name, 0.01, ramp(share)) for name, share in ((AT_ONCE, 0), (FAST, 0.01))),
    CANDIDATES[PAPER],
    Candidate(SLOWER, 0.01, ramp(0.5)),
    CANDIDATES[AUTO],
)


def run(job: Job, progress):
    rows = train(named(RAMPS, job.candidate).put_into(initial(job.seeds), job.steps), CONDITION, job, progress)
    late = [row for row in rows if row["measure"] == LOSS and row["x"] > 0.05 * job.steps]
    largest = {seed: max(row["value"] for row in late if row["seed"] == seed) for seed in job.seeds}
    return rows + [{"measure": LARGEST, "x": job.steps, "seed": seed, "value": largest[seed]} for seed in job.seeds]


def judge(rows):
    found = []
    for name in (AT_ONCE, FAST):
        pairs = values(rows, CONDITION.name, name, LARGEST) - values(rows, CONDITION.name, PAPER, LARGEST)
        numbers = interval(list(pairs))
        statement = f"{name}: larger than with the paper's ramp"
        found.append(Judgement(statement, str(numbers), more(numbers, negligible=0.1), headline=True))
    for name in (PAPER, AUTO):
        pairs = values(rows, CONDITION.name, name, LARGEST) - values(rows, CONDITION.name, "BN, 0.01", LARGEST)
        numbers = interval(list(pairs))
        found.append(Judgement(f"{name}: larger than BatchNorm's", str(numbers), more(numbers, negligible=0.1)))
    return found


EXPERIMENT = Experiment(
    claim="Raising r_max too fast makes the training loss spike",
    source="Ioffe 2017, section 3: limits are opened gradually, as large corrections early make training unstable",
    setup=f"{NETWORK}; {OPTIMIZER}, learning rate 0.05; iid batches of 32; 1,200 steps. The paper's schedule scaled to "
    "them (closed for 1/32; d_max at 5/32; r_max 3 at 1/4) with the ramp of r_max replaced; momentum 0.01",
    rule="the largest training loss after the first 5 % of the steps is above that with the paper's ramp, by seed "
    "(0.1 is negligible)",
    limits="one learning rate; d_max opens alike in all but the automatic limits, so that its part is not seen",
    jobs=lambda quick: jobs_of([(CONDITION.name, CONDITION.steps)], quick, RAMPS),
    run=run,
    judge=judge,
    draw=curves([CONDITION.name], LOSS),
    table=LARGEST,
)
