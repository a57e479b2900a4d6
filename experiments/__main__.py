"""``python -m experiments [LETTERS]``: run them, and go on where they were; ``--docs`` writes the page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import docs
from .claims import NAMES, experiment
from .pool import run
from .record import RESULTS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("letters", nargs="*", metavar="LETTER", help=f"of {', '.join(NAMES)}; all unless given")
    parser.add_argument("--quick", action="store_true", help="2 seeds, few steps: whether it works at all")
    parser.add_argument("--fresh", action="store_true", help="measure again what is recorded")
    parser.add_argument("--out", type=Path, help="folder of the CSVs (default: experiments/results)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.add_argument("--docs", action="store_true", help="only write docs/when-to-use.md from the CSVs")
    options = parser.parse_args(arguments)
    unknown = [letter for letter in options.letters if letter not in NAMES]
    if unknown or options.workers < 1:
        parser.error(f"no experiment {unknown[0]!r}" if unknown else "--workers must be at least 1")
    if options.quick and options.out is None:
        parser.error("--quick needs --out: it must not replace what is recorded")
    chosen = {letter: experiment(letter) for letter in options.letters or NAMES}
    if options.docs:
        print(docs.write({letter: experiment(letter) for letter in NAMES}, options.out or RESULTS))
        return 0
    results = options.out or RESULTS
    run(chosen, results, options.quick, options.fresh, options.workers)
    for letter, one in chosen.items():
        print(docs.summary(letter, one, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
