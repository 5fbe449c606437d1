"""`sparity run --track`: the run reaches the tracker that is named, or is refused before it begins."""

import sys
from types import SimpleNamespace

from sparity import Recipe


def test_a_run_is_told_to_the_tracker_that_is_named(sparity, recipe_file, tmp_path, monkeypatch):
    begun, logged, ended = [], [], []
    library = SimpleNamespace(
        init=lambda **named: begun.append(named),
        log=lambda numbers, step: logged.append((step, numbers)),
        finish=lambda: ended.append(True),
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    recipe = recipe_file({"sparsity": 0.25})
    done = sparity("run", recipe, "-o", tmp_path / "out", "--track", "wandb", "--project", "mine", "--json")
    assert done.code == 0
    assert begun == [{"project": "mine", "config": Recipe.read(recipe).summary()}]
    assert [step for step, _ in logged] == [1, 2, 3, 3]
    assert logged[-1][1]["sparsity"] == done.json["candidates"][0]["sparsity"]
    assert ended == [True]


def test_without_the_library_nothing_is_begun(sparity, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    done = sparity("run", recipe_file(), "-o", tmp_path / "out", "--track", "trackio")
    assert (done.code, done.err) == (1, "error: trackio is not installed: pip install trackio\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
