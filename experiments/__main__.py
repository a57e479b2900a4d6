"""``python -m experiments [LETTERS]``: run them, and go on where they were; ``--docs`` writes the page."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from tqdm import tqdm

from . import docs
from .common import Experiment, Job, Row
from .record import RESULTS, Results, about

HERE = Path(__file__).parent
NAMES = {path.stem[0]: path.stem for path in sorted(HERE.glob("[a-z]_*.py"))}
_steps: Any = None  # of a worker: the queue that counts steps


def experiment(letter: str) -> Experiment:
    return import_module(f"experiments.{NAMES[letter]}").EXPERIMENT


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


def run(chosen: dict[str, Experiment], results: Path, quick: bool, fresh: bool, workers: int) -> None:
    """All jobs that are not recorded yet, the longest first."""
    files = {letter: Results(results / f"{NAMES[letter]}.csv", fresh) for letter in chosen}
    jobs = [
        (letter, job) for letter, one in chosen.items() for job in one.jobs(quick) if str(job) not in files[letter].done
    ]
    jobs.sort(key=lambda pair: -pair[1].steps)
    context = multiprocessing.get_context("spawn")
    steps = context.Manager().Queue()
    with (
        tqdm(total=sum(job.steps for _, job in jobs), unit="step", mininterval=1, smoothing=0.02) as bar,
        ProcessPoolExecutor(workers, context, _begin, (steps,)) as pool,
    ):
        counter = Thread(target=_count, args=(steps, bar), daemon=True)
        counter.start()
        waiting: dict[Future, tuple[str, Job]] = {pool.submit(_do, *pair): pair for pair in jobs}
        try:
            for done in as_completed(waiting):
                letter, job = waiting[done]
                rows, origin = done.result()
                files[letter].add(job, rows, origin)
                bar.set_postfix_str(f"{letter}: {job.condition}, {job.candidate}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        steps.put(None)
        counter.join()


def _begin(steps: Any) -> None:
    """Of a worker."""
    import torch

    global _steps
    torch.set_num_threads(1)  # the tensors are too small for more
    _steps = steps


def _do(letter: str, job: Job) -> tuple[list[Row], dict[str, str]]:
    unsent = 0

    def progress() -> None:
        nonlocal unsent
        unsent += 1
        if unsent == 20:
            _steps.put(unsent)
            unsent = 0

    rows = experiment(letter).run(job, progress)
    _steps.put(unsent)
    return rows, about()


def _count(steps: Any, bar: tqdm) -> None:
    while (done := steps.get()) is not None:
        bar.update(done)


if __name__ == "__main__":
    sys.exit(main())
