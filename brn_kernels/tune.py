"""``brn tune``: Optuna over the schedule and the momentum, with the user's own training as the objective."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .schedule import ClipSchedule

if TYPE_CHECKING:
    import optuna

Objective = Callable[[ClipSchedule, float, "optuna.Trial"], float]

_DEFAULT = "defaults"  # marks their trial
PLOTS = ("plot_optimization_history", "plot_param_importances", "plot_slice", "plot_parallel_coordinate")


class StudyError(ValueError):
    """What was asked for cannot be done; the message is one line."""


def suggest(trial: optuna.Trial, steps: int) -> tuple[ClipSchedule, float]:
    """A schedule and a momentum for a training of ``steps``; hold and ramps are shares of it."""
    schedule = ClipSchedule(
        r_max=trial.suggest_float("r_max", 1.0, 5.0),
        d_max=trial.suggest_float("d_max", 0.0, 8.0),
        hold=round(steps * trial.suggest_float("hold", 0.0, 0.3)),
        r_ramp=round(steps * trial.suggest_float("r_ramp", 0.0, 0.7)),
        d_ramp=round(steps * trial.suggest_float("d_ramp", 0.0, 0.7)),
    )
    return schedule, trial.suggest_float("momentum", 0.003, 0.3, log=True)


def tune(
    objective: Objective,
    *,
    steps: int,
    trials: int | None = 30,
    timeout: float | None = None,
    study: str = "brn",
    storage: str | None = "sqlite:///brn-tune.db",
    maximize: bool = False,
    seed: int = 0,
) -> optuna.Study:
    """Look for the schedule and the momentum that make ``objective`` best, with Optuna's TPE.

    The defaults for such a training (``ClipSchedule.for_training``, momentum 0.01) are tried first. A training that
    calls ``trial.report(value, step)`` and raises ``optuna.TrialPruned`` when ``trial.should_prune()`` is stopped early
    if it is worse than the median of the others.

    Args:
        objective: trains with a schedule and a momentum and returns what is to be minimized.
        steps: of a training.
        trials: that are to be finished in all, those of earlier runs included; None: until the timeout.
        timeout: in seconds, after which no further trial begins.
        study: the name under which the storage keeps it; the same name goes on.
        storage: SQLAlchemy's URL of a database; None: in memory.
        maximize: whether more is better.
        seed: of the sampler; a study that goes on draws other points.

    Raises:
        StudyError: a ``ValueError``: a number out of its range; a storage that cannot be opened; a study of that name
            with the other direction or other ``steps``.
        ModuleNotFoundError: Optuna is not installed.
    """
    import optuna

    if steps < 1 or (trials is not None and trials < 1) or (timeout is not None and not timeout > 0):
        raise StudyError(f"steps, trials and timeout must be positive, got {steps}, {trials}, {timeout}")
    if trials is None and timeout is None:
        raise StudyError("trials and timeout: expected at least one of them")
    direction: Literal["maximize", "minimize"] = "maximize" if maximize else "minimize"
    try:
        found = optuna.create_study(
            study_name=study, storage=storage, load_if_exists=True, direction=direction,
            pruner=optuna.pruners.MedianPruner(),
        )  # fmt: skip
    except Exception as error:  # the database's own, of many kinds
        raise StudyError(f"storage {storage!r} cannot be opened: {error}") from error
    _check_same({"direction": found.direction.name.lower(), **found.user_attrs}, study, direction, steps)
    found.set_user_attr("steps", steps)
    found.sampler = optuna.samplers.TPESampler(seed=seed + len(found.trials))  # one seed would repeat its first points
    if not any(_is_default(trial) for trial in found.trials):
        default = ClipSchedule.for_training(steps)
        parts = {name: getattr(default, name) / steps for name in ("hold", "r_ramp", "d_ramp")}
        found.enqueue_trial(
            {"r_max": default.r_max, "d_max": default.d_max, "momentum": 0.01} | parts, {_DEFAULT: True}
        )
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    left = None if trials is None else trials - len(found.get_trials(states=done))
    if left is None or left > 0:
        found.optimize(lambda trial: objective(*suggest(trial, steps), trial), n_trials=left, timeout=timeout)
    return found


def _is_default(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether it is that of the defaults and has been, or will be, run to an end."""
    import optuna

    states = optuna.trial.TrialState
    return _DEFAULT in trial.user_attrs and trial.state in (states.COMPLETE, states.PRUNED, states.WAITING)


def _check_same(found: dict[str, Any], study: str, direction: str, steps: int) -> None:
    """Optuna itself goes on with what the storage has, whatever is asked for."""
    for name, asked in (("direction", direction), ("steps", steps)):
        if found.get(name, asked) != asked:
            raise StudyError(
                f"the storage has a study {study!r} with {name} {found[name]}, not {asked}: give another name"
            )


def best_line(study: optuna.Study, steps: int) -> str:
    """The best trial as Python, to be pasted.

    Raises:
        StudyError: no trial was finished.
    """
    import optuna

    states = [trial.state for trial in study.trials]
    if optuna.trial.TrialState.COMPLETE not in states:
        pruned = states.count(optuna.trial.TrialState.PRUNED)
        failed = len(states) - pruned
        raise StudyError(
            f"no trial of {len(states)} gave a value: {pruned} pruned, {failed} failed (NaN, or no number?)"
        )
    schedule, momentum = suggest(optuna.trial.FixedTrial(study.best_params), steps)  # type: ignore[arg-type]
    return f"brn.convert_batchnorm(model, schedule=brn.{schedule!r}, momentum={momentum:.4g})"


def plot(study: optuna.Study, folder: Path) -> list[Path]:
    """Optuna's own figures of a study; those that it cannot draw of so few trials are left out."""
    import matplotlib
    import optuna
    import optuna.visualization.matplotlib as drawing

    matplotlib.use("Agg")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"no folder for plots: {error}") from error
    drawn = []
    for name in PLOTS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                axes: Any = getattr(drawing, name)(study)
        except (RuntimeError, ValueError):
            continue
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
        path = folder / f"{name.removeprefix('plot_')}.png"
        figure.savefig(path, bbox_inches="tight")
        drawn.append(path)
    return drawn
