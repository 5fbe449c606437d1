"""Where the runs of a study are worked through: here, in processes of this machine, on Ray or on Slurm.

Tasks leave their results in files, so an executor has nothing to bring back but how a task ended. All give the same
results; a worker that is killed costs its own task only.
"""

import importlib.util
import multiprocessing
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from sparity.errors import InvalidInput, SparityError

Task = Callable[[], None]  # can be pickled
LOOK = 0.2  # seconds between two looks at jobs elsewhere
FORMS = "here, pool:WORKERS, ray, ray:ADDRESS, slurm or slurm:PARTITION"


class Lost(SparityError):
    """The worker that had a task is gone, killed by the system above all."""


@dataclass(frozen=True)
class Ended:
    """How a task ended: with what it raised, with `Lost`, or well."""

    index: int
    error: BaseException | None = None


class Executor(Protocol):
    """Works through tasks."""

    def run(self, tasks: Sequence[Task], threads: int, folder: Path) -> Iterator[Ended]:
        """Every task as it ends; when the iterator is closed the others are stopped.

        Args:
            tasks: in the order in which they begin.
            threads: that each works with.
            folder: for notes of the executor, seen by every worker.
        """


def executor_of(name: str) -> Executor | None:
    """The executor of that name; None for "here", the process that asks.

    Raises:
        InvalidInput: no such name, or the package that it needs is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind == "here" and not rest:
        return None
    if kind == "pool" and rest.isdecimal() and int(rest) > 0:
        return Pool(int(rest))
    if kind == "ray":
        _require("ray", "ray")
        return Ray(rest or None)
    if kind == "slurm":
        _require("submitit", "slurm")
        return Submitit(partition=rest or None)
    raise InvalidInput(f"{name!r} says not where to run (use {FORMS})")


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InvalidInput(
            f"the package {package} is not installed: pip install 'sparity[{extra}]', or use pool:WORKERS"
        )


@dataclass(frozen=True)
class Pool:
    """Processes of this machine, a new one for each task, so many at a time."""

    workers: int

    def run(self, tasks: Sequence[Task], threads: int, folder: Path) -> Iterator[Ended]:
        """See `Executor.run`."""
        context = multiprocessing.get_context("spawn")
        waiting, running = deque(enumerate(tasks)), dict[Any, tuple[int, Any]]()
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    index, task = waiting.popleft()
                    here, there = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(task, there))
                    process.start()
                    there.close()
                    running[here] = (index, process)
                for end in wait(list(running)):
                    index, process = running.pop(end)
                    yield Ended(index, _outcome(end, process))
        finally:
            for _, process in running.values():
                process.kill()
                process.join()


def _work(task: Task, end: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    error: BaseException | None = None
    try:
        task()
    except Exception as raised:  # noqa: BLE001 - whoever asked for the task decides what to do with it
        error = _portable(raised)
    end.send(error)


def _end_with(parent: Any) -> None:
    """A worker whose parent was killed must not go on: whoever resumes the study does its task."""
    parent.join()
    os._exit(1)


def _portable(error: Exception) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - errors of libraries may hold anything
        return SparityError(f"{type(error).__name__}: {error}")
    return error


def _outcome(end: Any, process: Any) -> BaseException | None:
    try:
        error: BaseException | None = end.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        said = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Lost(f"its process was ended ({said}), which the system does when memory is short")
    process.join()
    return error


@dataclass(frozen=True)
class Ray:
    """Tasks of Ray, on the cluster at an address, or one of this machine."""

    address: str | None = None

    def run(self, tasks: Sequence[Task], threads: int, folder: Path) -> Iterator[Ended]:
        """See `Executor.run`."""
        import ray

        if not ray.is_initialized():
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False)
        remote = ray.remote(num_cpus=threads, max_retries=0)(_call)
        jobs = {remote.remote(task): index for index, task in enumerate(tasks)}
        try:
            while jobs:
                (job, *_), _ = ray.wait(list(jobs), num_returns=1)
                index = jobs.pop(job)
                try:
                    yield Ended(index, ray.get(job))
                except ray.exceptions.RayError as error:
                    yield Ended(index, Lost(f"its worker on Ray was lost ({type(error).__name__})"))
        finally:
            for job in jobs:
                ray.cancel(job, force=True)


def _call(task: Task) -> BaseException | None:
    try:
        task()
    except Exception as error:  # noqa: BLE001 - whoever asked for the task decides what to do with it
        return _portable(error)
    return None


@dataclass(frozen=True)
class Submitit:
    """Jobs of Slurm, all submitted at once: the cluster says when each begins."""

    partition: str | None = None
    cluster: str = "slurm"  # or "local": processes of this machine, all at once
    minutes: int = 24 * 60

    def run(self, tasks: Sequence[Task], threads: int, folder: Path) -> Iterator[Ended]:
        """See `Executor.run`."""
        import submitit

        executor = submitit.AutoExecutor(folder=str(folder), cluster=self.cluster)
        executor.update_parameters(timeout_min=self.minutes, cpus_per_task=threads, name="sparity")
        if self.partition is not None:
            executor.update_parameters(slurm_partition=self.partition)
        jobs = {index: executor.submit(_call, task) for index, task in enumerate(tasks)}
        try:
            while jobs:
                for index in [index for index, job in jobs.items() if job.done()]:
                    job = jobs.pop(index)
                    lost = job.exception()
                    yield Ended(index, job.result() if lost is None else _lost_job(lost))
                time.sleep(LOOK)
        finally:
            for job in jobs.values():
                job.cancel(check=False)


def _lost_job(error: BaseException) -> SparityError:
    """A job that was killed is lost; one that could not even begin says so, and so will all the others."""
    last = (str(error).strip().splitlines() or [""])[-1]
    if type(error).__name__ == "FailedJobError":
        return SparityError(f"a job could not begin on its worker: {last}")
    return Lost(f"its job was ended before its time ({last})")
