"""Sweeps and their tasks elsewhere than in the process that asks."""

import os
import time
from functools import partial

import pytest
import tasks

import sparity
from sparity.errors import InvalidInput, SparityError
from sparity.pipeline.studies import sweeping
from sparity.pipeline.studies.executors import Ended, Lost, Pool, Submitit, executor_of
from sparity.sweep_file import Sweep
from sweeps import measured


def test_a_worker_that_is_killed_costs_its_own_task(tmp_path):
    files = [tmp_path / name for name in "ab"]
    work = [
        partial(tasks.leave, files[0], "first"),
        tasks.die,
        partial(tasks.fail, "of its own"),
        tasks.fail_oddly,
        partial(tasks.leave, files[1], "last"),
    ]
    ended = {each.index: each.error for each in Pool(2).run(work, 1, tmp_path)}
    assert [file.read_text() for file in files] == ["first", "last"]
    assert ended[0] is ended[4] is None
    assert isinstance(ended[1], Lost)
    assert "signal 9" in str(ended[1])
    assert isinstance(ended[2], ValueError)
    assert str(ended[2]) == "of its own"
    assert isinstance(ended[3], SparityError)
    assert str(ended[3]) == "Odd: no other process knows this class"


def test_closing_stops_what_runs(tmp_path):
    path = tmp_path / "pid"
    running = Pool(2).run([partial(tasks.stay, path), partial(tasks.leave, tmp_path / "x", "")], 1, tmp_path)
    assert next(running) == Ended(1)
    while not path.exists() or not path.read_text():
        time.sleep(0.02)
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)


def test_submitit_runs_the_same_tasks(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(tasks.__file__), prepend=os.pathsep)
    work = [partial(tasks.leave, tmp_path / "a", "left"), partial(tasks.fail, "of its own"), tasks.die]
    ended = {each.index: each.error for each in Submitit(cluster="local").run(work, 1, tmp_path / "jobs")}
    assert (tmp_path / "a").read_text() == "left"
    assert ended[0] is None
    assert isinstance(ended[1], ValueError)
    assert isinstance(ended[2], Lost)


@pytest.mark.parametrize("name", ["there", "pool", "pool:0", "pool:two", "here:2"])
def test_places_that_are_none_are_refused(name):
    with pytest.raises(InvalidInput, match="says not where to run"):
        executor_of(name)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, extra in (("ray", "ray"), ("slurm:gpu", "slurm")):
        with pytest.raises(InvalidInput, match=rf"pip install 'sparity\[{extra}\]'"):
            executor_of(name)


def test_a_sweep_in_a_pool_is_the_one_here(plan, tmp_path):
    plan["vary"] = {"stages.0.prune.sparsity": [0.5]}
    here = sparity.sweep(plan, output=tmp_path / "here", device="cpu")
    there = sparity.sweep(plan, output=tmp_path / "there", device="cpu", on="pool:2")
    assert measured(there) == measured(here)
    assert sorted(os.listdir(tmp_path / "there")) == ["sweep.csv", "sweep.html", "sweep.json"]


class Losing:
    """An executor in this process, from the last task to the first, whose second task is lost."""

    def __init__(self, seen):
        self.seen = seen

    def run(self, work, threads, folder):
        self.seen.append(len(work))
        for index in reversed(range(len(work))):
            if index != 1:
                work[index]()
            yield Ended(index, Lost("its process was ended") if index == 1 else None)


def test_a_lost_combination_is_a_row_and_is_tried_again(plan, tmp_path, monkeypatch):
    fail, seen = {"times": 1}, []
    plan["base"]["measure"]["speed"] = None
    monkeypatch.setattr(sweeping, "executor_of", lambda name: Losing(seen))
    write = sweeping._write_table

    def stopped(sweep, rows, folder):
        report = write(sweep, rows, folder)
        assert [row.labels for row in rows] == sorted(row.labels for row in rows)  # the order of the axes
        if len(rows) == 4 and fail["times"]:
            fail["times"] -= 1
            raise SparityError("stopped")
        return report

    monkeypatch.setattr(sweeping, "_write_table", stopped)
    with pytest.raises(SparityError, match="stopped"):
        sparity.sweep(plan, output=tmp_path / "out", on="elsewhere")
    assert (tmp_path / "out.partial" / "sweep.csv").exists()  # can be looked at
    report = sparity.sweep(plan, output=tmp_path / "out", on="elsewhere", resume=True).report
    assert seen == [4, 1]  # the lost one alone is tried again
    assert not report.failed
    assert [row.words for row in report.rows] == [each.words for each in Sweep.read(plan).combinations]


def test_speed_is_measured_alone(plan, tmp_path, monkeypatch):
    seen = []
    plan["base"]["measure"]["speed"] = {"prompt": 4, "tokens": 2, "rounds": 1}
    plan["vary"] = {"x": {"fast": {}, "plain": {"measure.speed": None}, "faster": {"stages.0.prune.sparsity": 0.7}}}
    monkeypatch.setattr(sweeping, "executor_of", lambda name: Losing(seen))
    report = sparity.sweep(plan, output=tmp_path / "out", on="elsewhere").report
    assert seen == [1, 1, 1]  # the one that measures no speed, then each of the others by itself
    assert [row.decode_ratio is not None for row in report.rows] == [True, False, True]


def test_a_model_in_memory_stays_here(plan, family_models):
    with pytest.raises(InvalidInput, match="a model in memory cannot be swept on pool:2"):
        sparity.sweep(plan, model=family_models["llama"], on="pool:2")
