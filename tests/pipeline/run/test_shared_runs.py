"""Runs that several processes share: the same files as from one, also after one was killed."""

import os
import signal

import pytest
from forked import in_ranks

from interruptions import contents
from sparity.calibration import chunks
from sparity.errors import RunConflict, SparityError
from sparity.pipeline.run import block_edits
from sparity.pipeline.run.progress import Silence
from sparity.pipeline.run.runner import execute
from sparity.pipeline.run.shared_folder import agree
from sparity.processes.group import ALONE
from sparity.recipe import Recipe
from sparity.static.prune import stage
from sparity.static.prune.pruning import Pruning

CALIBRATION = {"text": "python-docs:calibration", "samples": 5, "length": 32, "batch": 2}
NOTHING = {"perplexity": [], "speed": None}
TEXTS = {"perplexity": ["python-docs:held-out"], "window": 48, "windows": 3, "speed": None, "layer_loss": True}
RECIPES = {
    "sequential": (
        "zoo:llama",
        [{"prune": {"score": "wanda", "solver": "sparsegpt", "true_sequential": True}}, {"quantize": {"bits": 8}}],
        TEXTS,
    ),
    "independent": (
        "zoo:llama",
        [
            {"prune": {"score": "wanda", "compare_within": "global", "order": "independent"}},
            {"activations": {"method": "teal", "sparsity": 0.3}},
        ],
        NOTHING,
    ),
    "shapes and gradients": ("zoo:llama", [{"channels": {"sparsity": 0.25}}, {"prune": {"score": "gblm"}}], NOTHING),
    "rounds": (
        "zoo:llama",
        [{"prune": {"score": "wanda_plus_plus", "rounds": {"count": 1, "rate": 1e-4, "samples": 2}}}],
        {**NOTHING, "layer_loss": True},
    ),
    "experts": ("zoo:moe", [{"prune": {"score": "wanda", "budget": "owl", "unseen_expert": "dense"}}], NOTHING),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of very little text."""
    monkeypatch.setattr(chunks, "FEWEST", 1)


def run(name, output, group=ALONE, **options):
    model, stages, measured = RECIPES[name]
    recipe = Recipe.read({"model": model, "calibration": CALIBRATION, "stages": stages, "measure": measured})
    return execute(recipe, Silence(), output=output, device="cpu", group=group, **options)


def checkpoint(folder):
    """Every file that is not about how long things took."""
    about = ("README.md", "report.html", "sparity.json")
    return {name: digest for name, digest in contents(folder).items() if name not in about}


@pytest.mark.parametrize("name", RECIPES)
def test_the_checkpoint_does_not_depend_on_how_many_processes_made_it(tmp_path, name):
    alone = run(name, tmp_path / "alone").report.candidates[0]
    expected = checkpoint(tmp_path / "alone")
    output, size = tmp_path / "shared", {"sequential": 4, "experts": 3}.get(name, 2)
    reports = in_ranks(size, lambda group: run(name, output, group).report.candidates[0])
    assert checkpoint(output) == expected
    assert sorted(os.listdir(tmp_path)) == ["alone", "shared"]
    for report in reports:  # every rank has the same
        assert report.quality == alone.quality
        assert report.changes == alone.changes


def test_a_killed_rank_loses_one_block_and_the_run_goes_on_with_fewer(tmp_path, monkeypatch):
    edit, output = block_edits.edit_block, tmp_path / "out"
    run("experts", tmp_path / "alone")

    def dying(planned, decisions, sources, visit, *rest):
        if visit.group.rank == 1 and visit.block.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return edit(planned, decisions, sources, visit, *rest)

    monkeypatch.setattr("sparity.pipeline.run.passes.edit_block", dying)
    found = in_ranks(3, lambda group: run("experts", output, group))
    assert found[1] is None
    assert all(isinstance(error, SparityError) for error in (found[0], found[2]))
    assert not output.exists()
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "FEWEST", 1)
    begun = []

    def noted(planned, decisions, sources, visit, *rest):
        begun.append(visit.block.index)
        return edit(planned, decisions, sources, visit, *rest)

    monkeypatch.setattr("sparity.pipeline.run.passes.edit_block", noted)

    def resumed(group):
        run("experts", output, group, resume=True)
        return begun

    assert in_ranks(2, resumed) == [[2, 3, 4, 5]] * 2
    assert checkpoint(output) == checkpoint(tmp_path / "alone")


def test_a_full_disk_on_rank_0_is_every_ranks_error(tmp_path, monkeypatch):
    def full(path, value):
        raise SparityError(f"the disk is full: {path.name}")

    monkeypatch.setattr("sparity.pipeline.run.pass_folder.write_json", full)
    first, second = in_ranks(2, lambda group: run("experts", tmp_path / "out", group))
    assert str(first) == "the disk is full: decision-0.json"
    assert str(second) == f"rank 0 stopped: {first}"


def test_a_rank_with_another_recipe_or_version_is_named(tmp_path, monkeypatch):
    def work(group):
        agree(group, {"recipe": {"stages": 1 + group.rank // 2}, "output": "x"})

    for error in in_ranks(3, work):
        assert isinstance(error, RunConflict)
        assert "rank 2 differs from rank 0 in recipe.stages" in str(error)

    def versions(group):
        if group.rank == 1:
            monkeypatch.setattr("sparity.pipeline.run.shared_folder.package_version", lambda name: "0.0.1")
        agree(group, {})

    for error in in_ranks(2, versions):
        assert "rank 1 differs from rank 0 in versions." in str(error)


def test_ranks_that_come_to_other_weights_are_named(tmp_path, monkeypatch):
    def work(group):
        edit = block_edits._united

        def disturbed(made, losses, warnings, group):
            made.block.projections[0].weight[0, 0] += group.rank
            return edit(made, losses, warnings, group)

        monkeypatch.setattr(block_edits, "_united", disturbed)
        run("experts", tmp_path / "out", group)

    for error in in_ranks(2, work):
        assert "rank 1 came to other weights than rank 0" in str(error)


def test_what_another_rank_warns_of_rank_0_says(tmp_path, monkeypatch, caplog):
    apply = Pruning.apply

    def warning(self, weight, statistics, *rest):
        stage.log.warning("%s is seen", statistics.site)
        return apply(self, weight, statistics, *rest)

    monkeypatch.setattr(Pruning, "apply", warning)

    def work(group):
        caplog.clear()
        run("experts", tmp_path / str(group.size), group)
        return sorted(message for message in caplog.messages if "is seen" in message)

    (alone,), shared = in_ranks(1, work), in_ranks(2, work)
    assert len(alone) > 6
    assert shared[0] == alone
