"""The stage structure: what it leaves beside the weights, stages one after another, and what it refuses."""

import json

import pytest
import torch

import sparity
from sparity.errors import InvalidInput
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe


def recipe(folder, tokens, *stages, **sections):
    return Recipe.read(
        {
            "model": str(folder),
            "calibration": {"tokens": tokens},
            "stages": [stage if isinstance(stage, dict) else {"structure": stage[0]} for stage in stages],
            "measure": {"perplexity": [], "speed": None},
            **sections,
        }
    )


def item(method, sparsity, **options):
    return {"structure": {"method": {method: options}, "sparsity": sparsity}}


def run(folder, token_files, output, *stages):
    result = sparity.run(recipe(folder, token_files["calibration"], *stages), output=output, device="cpu")
    assert verify(result.path).problems == ()
    return result, json.loads((output / "kept_indices.json").read_text())["kept"]


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None] % 97).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory, family_models):
    root = tmp_path_factory.mktemp("models")
    for name in ("mixtral", "qwen3", "gpt2"):
        family_models[name].save_pretrained(root / name)
    return root


def test_kept_indices_of_several_stages_are_those_of_the_dense_model(
    tiny_llama_folder, token_files, family_models, tmp_path
):
    dense = family_models["llama"]
    stages = (
        item("magnitude", 0.34, dimension="depth"),
        item("magnitude", 0.25),
        item("magnitude", 0.5, dimension="hidden_size"),
        {"channels": {"sparsity": 0.25}},
        item("magnitude", 0.5, dimension="hidden_size"),
    )
    result, kept = run(tiny_llama_folder, token_files, tmp_path / "out", *stages)
    found = result.model()
    config = found.config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size, config.head_dim) == (2, 36, 8, 8)
    depth = kept["model"]["depth"]
    assert (
        depth
        == sparity.structure_scores(dense, None, method="magnitude")["depth"].topk(2).indices.sort().values.tolist()
    )
    assert kept.keys() == {"model", *(f"model.layers.{index}" for index in depth)}
    channels = [kept.get(f"model.layers.{index}", {}).get("mlp_channels") for index in range(3)]
    assert [None if units is None else len(units) for units in channels].count(36) == 2
    at_once = sparity.cut(
        dense, {"depth": depth, "hidden_size": kept["model"]["hidden_size"], "mlp_channels": channels}
    )
    torch.testing.assert_close(logits(found), logits(at_once), rtol=1e-4, atol=1e-4)
    names = {change.name for change in result.report.candidates[0].changes}
    assert {name.split(".")[2] for name in names} == {"0", "1"}


def test_attentions_and_blocks_are_told_in_the_dense_models_numbers(tiny_llama_folder, token_files, tmp_path):
    stages = (item("two_ssp", 0.5, balance=1.0), item("sleb", 0.34), item("two_ssp", 0.5, balance=1.0))
    result, kept = run(tiny_llama_folder, token_files, tmp_path / "out", *stages)
    shared = kept["model"]
    assert shared["depth"] == [0, 2]
    silent = [not layer.self_attn.o_proj.weight.any() for layer in result.model().model.layers]
    assert [index in shared["attention"] for index in shared["depth"]] == [not quiet for quiet in silent]
    assert any(silent)


def test_experts_that_get_new_numbers_keep_their_history(folders, token_files, family_models, tmp_path):
    stages = ({"channels": {"sparsity": 0.25}}, item("reap", 0.25))
    result, kept = run(folders / "mixtral", token_files, tmp_path / "out", *stages)
    assert result.model().config.num_local_experts == 3
    changes = result.report.candidates[0].changes
    assert {change.name.split(".")[5] for change in changes if "experts" in change.name} == {"0", "1", "2"}
    for index in range(3):
        experts = kept[f"model.layers.{index}"]["experts"]
        assert len(experts) == 3
        dense = family_models["mixtral"].model.layers[index].mlp
        found = result.model().model.layers[index].mlp
        assert torch.equal(found.gate.weight, dense.gate.weight[experts])
        units = kept[f"model.layers.{index}"][f"mlp_channels.{experts[1]}"]
        assert torch.equal(found.experts.down_proj[1], dense.experts.down_proj[experts[1]][:, units])


REFUSED = [
    ("llama", item("flap", 0.3), r"flap lets blocks have different sizes, .* set `structure: UL-UM`"),
    ("llama", item("llm_pruner", 0.3, keep_first=1), "set `keep_first: 0` and `keep_last: 0`"),
    ("llama", item("slicegpt", 0.3), "set `rotation: global`"),
    ("llama", item("linear_map", 0.4, into="stream"), "set `into: mlp`"),
    ("llama", item("minitron", 0.3, dimension="hidden_size"), r"hidden_size = 23.*choose other sizes"),
    ("llama", item("minitron", 0.3, dimension="experts"), 'has no "experts" that could be cut: it has mlp_channels'),
    ("llama", item("minitron", 0.3, dimension="head_width"), 'has no "head_width" that could be cut'),
    ("llama", item("reap", 0.3), 'has no "experts"'),
    ("llama", item("sleb", 0.9), None),
    ("qwen3", item("flap", 0.5, structure="UL-UM"), 'biases, which a configuration of type "qwen3" cannot say: set'),
    ("mixtral", item("reap", 0.75), "1 would be left, but every token visits 2: lower the sparsity"),
    ("gpt2", item("minitron", 0.5, dimension="hidden_size"), "cut other dimensions"),
    ("gpt2", item("minitron", 0.5, dimension="query_heads"), "cannot say how wide a head is"),
]


@pytest.mark.parametrize(("name", "stage", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_no_stock_configuration_can_say_is_refused_before_any_work(
    name, stage, words, folders, tiny_llama_folder, token_files, tmp_path
):
    folder = tiny_llama_folder if name == "llama" else folders / name
    asked = recipe(folder, token_files["calibration"], stage)
    if words is None:  # known once the method runs: it may not take so many
        with pytest.raises(InvalidInput, match="sleb may remove 1 of the 3 blocks"):
            sparity.run(asked, output=tmp_path / "out", device="cpu")
        return
    with pytest.raises(InvalidInput, match=words):
        prepare(asked, device="cpu")


def test_it_comes_before_what_leaves_zeros_and_needs_text(tiny_llama_folder, token_files):
    with pytest.raises(InvalidInput, match=r"stages\.1 \(structure\) comes after stages\.0 \(prune\).*its zeros"):
        prepare(
            recipe(tiny_llama_folder, token_files["calibration"], {"prune": {}}, item("shortgpt", 0.34)), device="cpu"
        )
    without = {"model": str(tiny_llama_folder), "stages": [item("shortgpt", 0.34)], "measure": {"speed": None}}
    with pytest.raises(InvalidInput, match="needs calibration text"):
        prepare(Recipe.read({**without, "measure": {"perplexity": [], "speed": None}}), device="cpu")
    for wrong, words in (
        ({"sparsity": 1.0}, "less than 1"),
        ({"method": "minitrn"}, 'no method "minitrn"; did you mean'),
    ):
        with pytest.raises(InvalidInput, match=words):
            prepare(recipe(tiny_llama_folder, token_files["calibration"], {"structure": wrong}), device="cpu")
