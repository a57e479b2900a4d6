"""Claim i: tuning the limits, the ramps and the momentum pays."""

from __future__ import annotations

import optuna

from brn_kernels import ClipSchedule

from .candidates import AUTO, BN, CANDIDATES, PAPER, Candidate
from .common import ACCURACY, Experiment, Job, Judgement, values
from .figures import intervals
from .images import NETWORK, OPTIMIZER, Condition, digits, initial, train
from .verdicts import POINTS, interval, more

TRIALS, STEPS, VALIDATION = 12, 200, 300
SIDE_BY_SIDE = 2  # seeds of every training
WORKS = "iid 32, where BatchNorm works"
CONDITIONS = (Condition(WORKS, 32, 10, STEPS, 0.05), Condition("iid 4", 4, 10, STEPS, 0.1))
NAMES = [condition.name for condition in CONDITIONS]
GRID, TPE = "BRN, grid", "BRN, Optuna"
GRID_SPACE = {
    "r_max": [1.5, 3.0],
    "d_max": [0.5, 5.0],
    "hold": [1 / 32],
    "ramp": [1 / 4],
    "momentum": [0.01, 0.03, 0.1],
}


def suggested(trial: optuna.Trial) -> Candidate:
    """The search space. Durations are shares of the training; d opens in half of r's time, as in the paper."""
    r_max = trial.suggest_float("r_max", 1.0, 6.0)
    d_max = trial.suggest_float("d_max", 0.0, 8.0)
    hold = trial.suggest_float("hold", 0.0, 0.3)
    ramp = trial.suggest_float("ramp", 0.0, 0.6)
    momentum = trial.suggest_float("momentum", 0.003, 0.3, log=True)

    def schedule(steps: int) -> ClipSchedule:
        return ClipSchedule(r_max, d_max, round(hold * steps), round(ramp * steps), round(ramp * steps / 2))

    return Candidate("tuned", momentum, schedule)


def score(candidate: Candidate, condition: Condition, steps: int, first_seed: int, tuning: bool, progress) -> float:
    """Mean accuracy over seeds: on validation images while ``tuning``, which testing never sees, else "
    "on test images."""
    images, labels, *test = digits()
    training = images[VALIDATION:], labels[VALIDATION:]
    held_out = (images[:VALIDATION], labels[:VALIDATION]) if tuning else tuple(test)
    seeds = tuple(range(first_seed, first_seed + SIDE_BY_SIDE))
    job = Job(condition.name, candidate.name, seeds, steps)
    rows = train(candidate.put_into(initial(seeds), steps), condition, job, progress, (*training, *held_out))
    last = [row["value"] for row in rows if row["measure"] == ACCURACY and row["x"] == steps]
    return sum(last) / len(last)


def tuned(method: str, condition: Condition, steps: int, trials: int, seed: int, progress) -> Candidate:
    """The best of ``trials`` trainings on the validation images, by a grid in random order or by Optuna's TPE."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {
        GRID: optuna.samplers.GridSampler(GRID_SPACE, seed),
        TPE: optuna.samplers.TPESampler(seed=seed, n_startup_trials=4),
    }
    study = optuna.create_study(direction="maximize", sampler=samplers[method])
    study.optimize(lambda trial: score(suggested(trial), condition, steps, 1000 * (seed + 1), True, progress), trials)
    return suggested(optuna.trial.FixedTrial(study.best_params))


def run(job: Job, progress):
    condition = CONDITIONS[NAMES.index(job.condition)]
    (seed,) = job.seeds
    trials = TRIALS if job.steps == STEPS else 2
    untuned = CANDIDATES.get(job.candidate)
    candidate = untuned or tuned(job.candidate, condition, job.steps, trials, seed, progress)
    found = score(candidate, condition, job.steps, 1000 * (seed + 1) + 500, False, progress)
    return [{"measure": ACCURACY, "x": job.steps, "seed": seed, "value": found}]


def judge(rows):
    found = []
    for against, headline in ((PAPER, True), (AUTO, True), (BN, False)):
        for method in (GRID, TPE):
            for name in NAMES:
                gained = interval(list(values(rows, name, method) - values(rows, name, against)))
                statement = f"{method[5:]} against {against}, {name}: better by more than {POINTS:g}"
                found.append(Judgement(statement, str(gained), more(gained, POINTS, 0), headline))
    return found


EXPERIMENT = Experiment(
    claim="Tuning r_max, d_max, the ramps and the momentum pays",
    source="opinion; the other one is that it is wasted where BatchNorm works",
    setup=f"{NETWORK}; {OPTIMIZER}, learning rate 0.05 (0.1 at batch 4); {STEPS} steps. Each search has {TRIALS} "
    f"trainings of {SIDE_BY_SIDE} seeds, judged on {VALIDATION} of the 1,200 training images; what it chose is trained "
    "anew on other seeds and judged on the test images, which no search saw; a seed here is a whole search. Searched: "
    "r_max 1 to 6, d_max 0 to 8, hold 0 to 0.3 and ramp of r 0 to 0.6 of the steps, momentum 0.003 to 0.3. Grid: "
    "r_max 1.5, 3; d_max 0.5, 5; momentum 0.01, 0.03, 0.1",
    rule=f"test accuracy above that of the untuned settings by more than {POINTS:g} points, for each of them, method "
    "and condition by itself",
    limits="a short training, where momentum weighs most; a budget of 12 is small for five dimensions",
    jobs=lambda quick: [
        Job(condition.name, method, (seed,), *((3, 3) if quick else (STEPS, work)))
        for condition in CONDITIONS
        for method, work in zip((BN, PAPER, AUTO, GRID, TPE), 3 * [STEPS] + 2 * [(TRIALS + 1) * STEPS], strict=True)
        for seed in range(2 if quick else 4)
    ],
    run=run,
    judge=judge,
    draw=intervals(NAMES),
)
