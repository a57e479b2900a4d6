"""All jobs of some experiments, in worker processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm import tqdm

from .claims import NAMES, experiment
from .common import Experiment, Job, Row
from .record import Results, about

_steps: Any = None  # of a worker: the queue that counts steps


def run(chosen: dict[str, Experiment], results: Path, quick: bool, fresh: bool, workers: int) -> None:
    """All jobs that are not recorded yet, claim by claim, the longest first."""
    files = {letter: Results(results / f"{NAMES[letter]}.csv", fresh) for letter in chosen}
    jobs = [
        (letter, job) for letter, one in chosen.items() for job in one.jobs(quick) if str(job) not in files[letter].done
    ]
    jobs.sort(key=lambda pair: (pair[0], -(pair[1].work or pair[1].steps)))
    context = multiprocessing.get_context("spawn")
    steps = context.Manager().Queue()
    with (
        tqdm(total=sum(job.work or job.steps for _, job in jobs), unit="step", mininterval=1, smoothing=0.02) as bar,
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
        finally:
            steps.put(None)
            counter.join()


def _begin(steps: Any) -> None:
    """Of a worker."""
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed run must not leave workers behind that nobody listens to
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
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
