"""The verbs that explain: methods, explain and schema."""

from pathlib import Path

import pytest
import yaml

from sparity import registry
from sparity.recipe import Recipe

KINDS = (
    "activations.heal",
    "activations.method",
    "attention.layout",
    "budget",
    "cache.policy",
    "encoding",
    "family",
    "format",
    "heal.method",
    "prune.pattern",
    "prune.score",
    "prune.solver",
    "quantize.grid",
    "quantize.method",
    "sparse_training.method",
    "stage",
    "statistic",
    "structure.method",
)
PLUGINS = [(kind, name) for kind in KINDS for name in registry.names(kind)]


def test_methods(sparity):
    everything = sparity("methods", "--json").json
    assert {(kind, name) for kind, plugins in everything.items() for name in plugins} == set(PLUGINS)
    assert all(words for plugins in everything.values() for words in plugins.values())
    assert sparity("methods", "score", "--json").json == {"prune.score": everything["prune.score"]}
    shown = sparity("methods", "score").out
    assert "wanda" in shown
    assert "sparsegpt" not in shown
    assert sparity("methods", "scores", "--json").json == {"prune.score": everything["prune.score"]}
    assert sparity("methods", "families", "--json").json == {"family": everything["family"]}
    assert sparity("methods", "statistics", "--json").json == {"statistic": everything["statistic"]}
    assert sparity("methods", "scroe").err.startswith('error: no plug-in kind "scroe"; did you mean "score"?')


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_explain(sparity, kind, name):
    shown = sparity("explain", name)
    assert shown.code == 0
    assert f"{name} ({kind})" in shown.out
    (entry,) = [entry for entry in sparity("explain", name, "--json").json if entry["kind"] == kind]
    assert entry["source"]
    assert " ".join(entry["text"].split()) in " ".join(shown.out.split())
    for option in entry["options"]:
        assert f"  {option}: " in shown.out
    if kind == "stage":
        assert [stage.name for stage in Recipe.read(yaml.safe_load(entry["recipe"])).stages] == [name]
        assert entry["options"].keys() == registry.get(kind, name).model_fields.keys()
    elif kind not in ("attention.layout", "family", "format", "statistic"):
        recipe = Recipe.read(yaml.safe_load(entry["recipe"]))
        value = recipe.output.values
        if kind != "encoding":
            value = getattr(recipe.stages[0], kind.rpartition(".")[2])
        assert registry.get(kind, name).name == name
        assert value == name or kind == "prune.pattern"


def test_explain_tells_a_stages_options_and_needs(sparity):
    (entry,) = sparity("explain", "activations", "--json").json
    assert entry["options"]["sparsity"] == {
        "type": "float",
        "default": 0.4,
        "meaning": "share of the work that is skipped, in [0, 1): of the weights that a token need not read",
    }
    assert entry["options"]["prompt"]["type"] == "'dense' or 'sparse'"
    assert entry["facts"] == {"statistics": "histogram", "preserves": "experts, mask, prompts, shapes, tokens, values"}
    (entry,) = sparity("explain", "cats", "--json").json
    assert entry["facts"] == {"statistics": "inputs", "sites": "gate_output"}
    assert "arXiv:2404.08763" in entry["source"]
    assert sparity("methods", "stage", "--json").json["stage"].keys() >= {"activations", "prune"}


def test_explain_knows_a_pattern_by_its_notation(sparity):
    assert sparity("explain", "2:4", "--json").json[0]["name"] == "n_of_m"
    unknown = sparity("explain", "wnda")
    assert (unknown.code, unknown.err) == (
        1,
        'error: nothing is called "wnda"; did you mean "wanda"? `sparity methods` lists them all\n',
    )


def test_schema_allows_what_recipes_say_and_nothing_else(sparity):
    schema = sparity("schema").json

    def follow(part):
        while "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        return part

    def keys(value):
        return value if isinstance(value, dict) else ()

    def misfits(value, part, place=""):
        """Where a value breaks the schema: unknown keys, and values none of whose alternatives fit."""
        part = follow(part)
        if "anyOf" in part:
            meant = [choice for choice in part["anyOf"] if set(follow(choice).get("required", ())) <= set(keys(value))]
            found = [misfits(value, choice, place) for choice in meant or part["anyOf"]]
            return min(found, key=len)
        kinds = {
            "object": dict,
            "array": list,
            "string": str,
            "number": int | float,
            "integer": int,
            "null": type(None),
        }
        if "type" in part and part["type"] in kinds and not isinstance(value, kinds[part["type"]]):
            return [f"{place}: {value!r}"]
        if "enum" in part and value not in part["enum"]:
            return [f"{place}: {value!r}"]
        if isinstance(value, list):
            return [found for item in value for found in misfits(item, part.get("items", {}), place)]
        if not isinstance(value, dict) or "properties" not in part:
            return []
        assert part["additionalProperties"] is False
        unknown = [f"{place}.{key}" for key in value if key not in part["properties"]]
        known = [key for key in value if key in part["properties"]]
        return unknown + [
            found for key in known for found in misfits(value[key], part["properties"][key], f"{place}.{key}")
        ]

    right = {
        "model": "zoo:llama",
        "calibration": {"text": ["a", "b"], "samples": 4, "seed": 1},
        "stages": [{"prune": {"score": {"obs": {"damping": 0.1}}, "sparsity": 0.5, "overrides": {"*": 0.1}}}],
        "measure": {"perplexity": ["a.txt", {"tokens": "b.npy"}], "speed": None},
        "accept": {"perplexity": "+5%"},
    }
    Recipe.read(right)
    assert misfits(right, schema) == []
    wrong = {**right, "stages": [{"prune": {"scor": "wanda", "compare_within": "rows"}}], "mode": "zoo:llama"}
    assert sorted(misfits(wrong, schema)) == [".mode", ".stages.prune.compare_within: 'rows'", ".stages.prune.scor"]
    folder = Path(__file__).parents[2] / "recipes"
    for path in [folder / "main.yaml", *(folder / "methods").rglob("*.yaml")]:
        assert misfits(Recipe.read(path).model_dump(mode="json", exclude_unset=True), schema) == [], path
