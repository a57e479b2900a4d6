"""``brn tune``: Optuna's search over the clip schedule and the momentum, for the user's own objective.

All that searches, prunes, stores and plots is Optuna's; here is the search space alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
from sqlalchemy.exc import SQLAlchemyError

from .schedule import ClipSchedule

Objective = Callable[[ClipSchedule, float, optuna.Trial], float]

PLOTS = (
    "plot_optimization_history",
    "plot_param_importances",
    "plot_slice",
    "plot_intermediate_values",
)


@dataclass(frozen=True)
class Options:
    """How to search.

    Attributes:
        steps: of the training that the objective runs.
        trials: to add to the study; None for as many as ``timeout`` allows.
        timeout: seconds after which no trial is begun; None for none.
        direction: ``"maximize"`` or ``"minimize"``.
        study: its name; a study of that name in ``storage`` is gone on with.
        storage: a file for SQLite or a URL that SQLAlchemy knows; None keeps the study in memory.
        seed: of the sampler.
    """

    steps: int
    trials: int | None = 30
    timeout: float | None = None
    direction: str = "maximize"
    study: str = "brn"
    storage: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")
        if self.direction not in ("maximize", "minimize"):
            raise ValueError(f"direction must be maximize or minimize, got {self.direction!r}")


def suggest(trial: optuna.trial.BaseTrial, steps: int) -> tuple[ClipSchedule, float]:
    """The schedule and momentum of a trial. Durations are searched as shares of the training's ``steps``.

    Limits reach a little beyond the paper's 3 and 5; r_max 1 and d_max 0 are BatchNorm.
    """
    r_max = trial.suggest_float("r_max", 1.0, 5.0)
    d_max = trial.suggest_float("d_max", 0.0, 8.0)
    hold, r_ramp, d_ramp = (trial.suggest_float(name, 0.0, most) for name, most in SHARES.items())
    momentum = trial.suggest_float("momentum", 0.003, 0.3, log=True)
    schedule = ClipSchedule(
        r_max=r_max,
        d_max=d_max,
        hold=round(hold * steps),
        r_ramp=round(r_ramp * steps),
        d_ramp=round(d_ramp * steps),
    )
    return schedule, momentum


SHARES = {"hold": 0.25, "r_ramp": 0.5, "d_ramp": 0.5}  # the most of each; the paper's are 1/32, 7/32 and 1/8


def open_study(options: Options) -> optuna.Study:
    """The study: TPE; trials worse than the median of the others at the same step are pruned where they ask.

    Raises:
        ValueError: the stored study has another direction or is of another number of steps, or the storage cannot be
            opened.
    """
    try:
        study = optuna.create_study(
            study_name=options.study,
            storage=_url(options.storage),
            sampler=optuna.samplers.TPESampler(seed=options.seed),
            pruner=optuna.pruners.MedianPruner(),
            direction=optuna.study.StudyDirection[options.direction.upper()],
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError) as error:  # ImportError: the driver of a database
        raise ValueError(f"storage {options.storage} cannot be opened: {str(error).splitlines()[0]}") from error
    _check_same(study, options)
    if study.trials:  # the same seed again would repeat the first trials
        study.sampler = optuna.samplers.TPESampler(seed=options.seed + len(study.trials))
    return study


def search(study: optuna.Study, objective: Objective, options: Options) -> None:
    """Add trials to the study."""

    def run(trial: optuna.Trial) -> float:
        schedule, momentum = suggest(trial, options.steps)
        return objective(schedule, momentum, trial)

    study.optimize(run, n_trials=options.trials, timeout=options.timeout)


def _check_same(study: optuna.Study, options: Options) -> None:
    if study.direction.name.lower() != options.direction:
        raise ValueError(f"study {options.study!r} is there and does {study.direction.name.lower()}, another direction")
    steps = study.user_attrs.get("steps")
    if steps is None:
        study.set_user_attr("steps", options.steps)
    elif steps != options.steps:
        raise ValueError(f"study {options.study!r} is there and is of {steps} steps, not {options.steps}")


def _url(storage: str | None) -> str | None:
    return storage if storage is None or "://" in storage else f"sqlite:///{Path(storage).absolute()}"


def best_line(study: optuna.Study, steps: int) -> str:
    """The best trial as a line of Python.

    Raises:
        ValueError: no trial came to its end.
    """
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not done:
        raise ValueError("no trial came to its end")
    schedule, momentum = suggest(optuna.trial.FixedTrial(study.best_params), steps)
    r_max, d_max = float(f"{schedule.r_max:.4g}"), float(f"{schedule.d_max:.4g}")
    return (
        f"brn.convert_batchnorm(model, schedule=brn.ClipSchedule(r_max={r_max!r}, d_max={d_max!r}, "
        f"hold={schedule.hold}, r_ramp={schedule.r_ramp}, d_ramp={schedule.d_ramp}), momentum={momentum:.4g})"
    )


def write_plots(study: optuna.Study, folder: str) -> list[Path]:
    """Optuna's figures as PNG files; those that need more than the study has are left out.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import optuna.visualization.matplotlib as plots
    from matplotlib import pyplot

    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for name in PLOTS:
        path = Path(folder) / f"{name.removeprefix('plot_')}.png"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                drawn = getattr(plots, name)(study)
        except (RuntimeError, ValueError, ImportError):  # fewer than two trials, nothing reported, no scikit-learn
            continue
        axes = drawn.flat[0] if hasattr(drawn, "flat") else drawn
        axes.figure.savefig(path, bbox_inches="tight")
        pyplot.close(axes.figure)
        written.append(path)
    return written
