"""Sweep files: the order of the cross product, labels, what each label sets, overrides."""

import json
from pathlib import Path

import pytest

from sparity.errors import InvalidInput
from sparity.recipe import Recipe
from sparity.sweep_file import MOST, Sweep, SweepFile

BASE = {"model": "zoo:llama", "stages": [{"prune": {"score": "magnitude"}}]}
SPARSITY = "stages.0.prune.sparsity"


def sweep(vary, overrides=None, base=BASE, **arguments):
    return Sweep.read({"base": base, "vary": vary}, overrides, **arguments)


def prune(combination):
    return combination.recipe.stages[0]


def test_the_last_axis_changes_fastest():
    found = sweep(
        {
            "method": {"plain": {}, "sparsegpt": {"stages.0.prune.score": None, "stages.0.prune.solver": "sparsegpt"}},
            SPARSITY: [0.5, 0.3, 0.9],
        }
    )
    assert [axis.name for axis in found.axes] == ["method", SPARSITY]
    assert [combination.labels for combination in found.combinations] == [
        ("plain", "0.5"), ("plain", "0.3"), ("plain", "0.9"),
        ("sparsegpt", "0.5"), ("sparsegpt", "0.3"), ("sparsegpt", "0.9"),
    ]  # fmt: skip
    assert [(prune(c).score, prune(c).solver, prune(c).sparsity) for c in found.combinations] == [
        ("magnitude", "mask_only", 0.5), ("magnitude", "mask_only", 0.3), ("magnitude", "mask_only", 0.9),
        (None, "sparsegpt", 0.5), (None, "sparsegpt", 0.3), (None, "sparsegpt", 0.9),
    ]  # fmt: skip
    assert found.combinations[4].words == "sparsegpt, 0.3"
    assert found.base == Recipe.read(BASE)


@pytest.mark.parametrize(
    ("values", "labels", "numbers"),
    [
        ([0.3, 0.5], ("0.3", "0.5"), (0.3, 0.5)),
        ([0, 1e-5], ("0", "1e-05"), (0.0, 1e-5)),
        (["2:4", "unstructured"], ("2:4", "unstructured"), None),
        ([0.3, "0.5"], ("0.3", "0.5"), None),
        ([True, False, None], ("true", "false", "none"), None),
        ([{"ria": {"a": 0.25}}, "wanda"], ("{ria: {a: 0.25}}", "wanda"), None),
        ([["a", "b"]], ("[a, b]",), None),
    ],
)
def test_labels_of_listed_values(values, labels, numbers):
    (axis,) = sweep({"stages.0.prune.score.any": values}).axes
    assert (axis.labels, axis.numbers) == (labels, numbers)


def test_a_named_axis_may_have_numbers_for_labels():
    found = sweep({"twice as many": {16: {"measure.windows": 16}, 32: {"measure.windows": 32}}})
    assert found.axes[0].labels == ("16", "32")
    assert found.axes[0].numbers == (16.0, 32.0)
    assert [c.recipe.measure.windows for c in found.combinations] == [16, 32]


def test_a_label_sets_keys_that_the_base_does_not_have_and_changes_no_other_combination():
    vary = {"calibration": {"none": {}, "docs": {"calibration.text": "python-docs", "calibration.samples": 4}}}
    none, docs = sweep(vary).combinations
    assert none.recipe.calibration is None
    assert (docs.recipe.calibration.text, docs.recipe.calibration.samples) == ("python-docs", 4)
    whole = {"stages.0.prune": {"score": "ria"}, "stages.0.prune.sparsity": 0.3}
    found = sweep({"method": {"a": whole, "b": {"stages.0.prune": {"score": "ria"}}}})
    assert [prune(c).sparsity for c in found.combinations] == [0.3, None]
    assert (
        found.settings["method"]["a"] == whole == {"stages.0.prune": {"score": "ria"}, "stages.0.prune.sparsity": 0.3}
    )


def test_speed_is_off_unless_the_recipe_asks():
    asked = {**BASE, "measure": {"speed": {"rounds": 2}}}
    assert sweep({SPARSITY: [0.5]}).combinations[0].recipe.measure.speed is None
    assert sweep({SPARSITY: [0.5]}, base=asked).combinations[0].recipe.measure.speed.rounds == 2
    by_axis = sweep({"measure.speed.rounds": [1, 3]}).combinations
    assert [c.recipe.measure.speed.rounds for c in by_axis] == [1, 3]


def test_overrides_change_the_base_or_an_axis_and_not_what_was_given():
    given = {"base": BASE, "vary": {SPARSITY: [0.5], "measure.windows": [1, 2]}}
    before = json.dumps(given)
    found = Sweep.read(given, ["measure.window=32", f"vary.{SPARSITY}=[0.1, 0.2]"], "other/model")
    assert json.dumps(given) == before
    assert [c.labels for c in found.combinations] == [("0.1", "1"), ("0.1", "2"), ("0.2", "1"), ("0.2", "2")]
    assert {(c.recipe.measure.window, c.recipe.model) for c in found.combinations} == {(32, "other/model")}


def test_a_base_that_is_a_file_and_a_sweep_that_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(json.dumps(BASE))
    Path("sweep.yaml").write_text(f"base: recipe.yaml\nvary:\n  {SPARSITY}: [3e-1, 0.5]\n")
    found = Sweep.read("sweep.yaml")
    assert found.axes[0].labels == ("0.3", "0.5")
    assert found.combinations[0].recipe.model == "zoo:llama"
    assert found == Sweep.read(Path("sweep.yaml"))


def test_as_many_combinations_as_are_allowed():
    sets = {str(n): {"calibration": {"text": "python-docs", "seed": n}} for n in range(40)}
    assert len(sweep({"measure.windows": list(range(1, 26)), "set": sets}).combinations) == MOST
    with pytest.raises(InvalidInput, match=r"26 x 40 = 1,040 combinations are more than 1,000: take fewer values"):
        sweep({"measure.windows": list(range(1, 27)), "set": sets})


def test_the_schema_has_the_recipe_in_it():
    schema = SweepFile.model_json_schema()
    assert set(schema["properties"]) == {"base", "vary"}
    assert {"Recipe", "Measure"} <= set(schema["$defs"])
    stages = schema["$defs"]["Recipe"]["properties"]["stages"]["items"]["anyOf"]
    assert (
        "score" in next(item for item in stages if item["required"] == ["prune"])["properties"]["prune"]["properties"]
    )
