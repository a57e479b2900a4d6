"""``brn advise`` and ``brn tune``: the commands that call the user's own functions."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """What the user gave cannot be used; the message is one line."""


def add_advise(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``brn advise``."""
    parser = commands.add_parser(
        "advise",
        help="is BatchNorm enough for your model and batches, or Batch Renormalization? With which settings?",
        description="Runs a few dozen batches in training mode, changes nothing in the model, and says which layer to "
        "use, with which momentum and limits, and why.",
    )
    parser.add_argument(
        "function", metavar="module:function", help="called without arguments: returns (model, batches)"
    )
    parser.add_argument("--batches", type=int, default=48, help="how many are run (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of your training: for the schedule")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw the layers into this file (.png, .svg, .pdf)")
    parser.set_defaults(run=_advise)


def add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``brn tune``."""
    parser = commands.add_parser(
        "tune",
        help="Optuna over the schedule and the momentum, with a training of your own",
        description="OBJECTIVE is a function of yours, objective(schedule, momentum, trial) -> float, that trains and "
        "returns what is to be minimized; trial is Optuna's. An interrupted study goes on when started again.",
    )
    parser.add_argument("objective", metavar="MODULE:OBJECTIVE")
    parser.add_argument("--steps", type=int, required=True, help="of a training")
    parser.add_argument("--trials", type=int, default=30, help="in all, earlier runs included (default: %(default)s)")
    parser.add_argument("--timeout", type=float, help="seconds after which no further trial begins")
    parser.add_argument("--study", default="brn", help="name of the study (default: %(default)s)")
    parser.add_argument("--storage", default="sqlite:///brn-tune.db", help="database (default: %(default)s)")
    parser.add_argument("--maximize", action="store_true", help="more is better")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where to put Optuna's figures")
    parser.set_defaults(run=_tune)


def load(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules are also looked for in the current folder.

    Raises:
        UserError: there is none.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"expected module:function, the module as it is imported, got {name!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"no module named {error.name!r} here or installed") from None
        raise
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"module {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function


def _advise(arguments: argparse.Namespace) -> int:
    from .advise import advise

    try:
        if arguments.figure:
            _check_figure(arguments.figure)
        function = load(arguments.function)
    except (UserError, ValueError) as error:
        return _refuse("advise", error)
    returned = function()
    try:
        if not (isinstance(returned, (tuple, list)) and len(returned) == 2):
            raise UserError(f"{arguments.function} must return (model, batches), got {_kind(returned)}")
        model, batches = returned
        advice = advise(model, batches, max_batches=arguments.batches, total_steps=arguments.steps)
    except (UserError, ValueError) as error:
        return _refuse("advise", error)
    print(advice.to_json() if arguments.json else advice, flush=True)
    if not arguments.figure:
        return 0
    try:
        Path(arguments.figure).parent.mkdir(parents=True, exist_ok=True)
        advice.figure(arguments.figure)
    except (OSError, ValueError) as error:
        return _refuse("advise", error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("brn advise --figure needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    return 0


def _check_figure(path: str) -> None:
    """Before anything is measured; that matplotlib is missing is said afterwards, when the report is printed."""
    with contextlib.suppress(ModuleNotFoundError):
        from .advise_figure import check_format

        check_format(path)


def _tune(arguments: argparse.Namespace) -> int:
    from . import tune

    try:
        study = tune.tune(
            load(arguments.objective), steps=arguments.steps, trials=arguments.trials, timeout=arguments.timeout,
            study=arguments.study, storage=arguments.storage, maximize=arguments.maximize,
        )  # fmt: skip
        best = tune.best_line(study, arguments.steps)
        print(f"best of {len(study.trials)} trials: {study.best_value:.6g}", best, sep="\n", flush=True)
        for path in tune.plot(study, arguments.plots) if arguments.plots else []:
            print(path)
    except ModuleNotFoundError as error:
        if error.name not in ("optuna", "matplotlib"):
            raise
        print(f"brn tune needs {error.name}: pip install 'brn_kernels[tune]'", file=sys.stderr)
        return 1
    except (UserError, tune.StudyError) as error:
        return _refuse("tune", error)
    return 0


def _kind(value: object) -> str:
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__


def _refuse(command: str, error: Exception) -> int:
    print(f"brn {command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
