"""Which experiments there are: one file a claim, ``<letter>_<name>.py``."""

from importlib import import_module
from pathlib import Path

from .common import Experiment

NAMES = {path.stem[0]: path.stem for path in sorted(Path(__file__).parent.glob("[a-z]_*.py"))}


def experiment(letter: str) -> Experiment:
    return import_module(f"experiments.{NAMES[letter]}").EXPERIMENT
