"""The stage `cache`: planned, run, saved with the model, loaded and attached again, and what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparity
from sparity.dynamic.cache.attaching import RUN
from sparity.dynamic.cache.stage import CacheStage
from sparity.errors import CorruptFile, InvalidInput, UnsupportedModel
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.recipe import Recipe

FILE = "sparity-dynamic/00-cache.safetensors"
IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(2))
OPTIONS = {"policy": {"snapkv": {"window": 4}}, "keep": 0.3, "sinks": 2, "recent": 3}


def recipe(options=OPTIONS, *more):
    return {"stages": [{"cache": options}, *more], "measure": {"speed": None}}


@pytest.fixture(scope="module")
def saved(family_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "out"
    return sparity.run(recipe(), model=family_models["llama"], output=out, device="cpu").path


@torch.no_grad()
def generated(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


@torch.no_grad()
def held(model):
    return [layer.store.lengths.tolist() for layer in model(IDS).past_key_values.layers]


def test_what_was_saved_generates_as_the_context_does(saved, family_models):
    with sparity.cache(family_models["llama"], OPTIONS["policy"], 0.3, sinks=2, recent=3):
        expected = generated(family_models["llama"])
    assert not torch.equal(expected, generated(family_models["llama"]))
    for model in (sparity.load(saved), AutoModelForCausalLM.from_pretrained(saved)):
        assert torch.equal(generated(model), expected)
        assert held(model) == [[12] * 4] * 3
    assert torch.equal(generated(sparity.load(saved, runtime=False)), generated(family_models["llama"]))


def test_what_is_saved_is_the_share_of_every_block(saved):
    data = load_file(saved / FILE)
    assert {name: float(keep) for name, keep in data.items()} == {
        f"model.layers.{index}.self_attn.k_proj.keep": 0.3 for index in range(3)
    }


def test_other_shares_in_the_data_are_obeyed_block_by_block(saved):
    data = load_file(saved / FILE)
    for index, keep in enumerate((0.5, 20.0, 1.0)):
        data[f"model.layers.{index}.self_attn.k_proj.keep"] = torch.tensor(keep, dtype=torch.float64)
    model = sparity.load(saved, runtime=False)
    with CacheStage.model_validate(OPTIONS).attach(model, input_sites(model), data):
        assert held(model) == [[20] * 4, [20] * 4, [40] * 4]


def test_saving_and_loading_again_keeps_the_policy(saved, tmp_path):
    model = sparity.load(saved)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(generated(sparity.load(tmp_path / "again")), generated(model))
    assert "sparity_cache" not in (tmp_path / "again" / "config.json").read_text()


def test_a_copy_of_the_model_has_the_policy_too(saved):
    model = sparity.load(saved)
    assert torch.equal(generated(copy.deepcopy(model)), generated(model))


def test_after_pruning_and_in_a_packed_checkpoint(family_models, token_files, tmp_path):
    stages = [{"prune": {"score": "magnitude", "sparsity": 0.5}}, {"cache": OPTIONS}]
    made = {"stages": stages, "measure": {"speed": None}, "output": {"format": "packed"}}
    result = sparity.run(made, model=family_models["llama"], output=tmp_path / "out")
    assert held(sparity.load(result.path)) == [[12] * 4] * 3
    with pytest.raises(InvalidInput, match="would lose"):
        prepare(Recipe.read({**made, "stages": stages[::-1]}), family_models["llama"])
    with pytest.raises(InvalidInput, match="which would lose what it keeps in the cache"):
        prepare(Recipe.read(recipe(OPTIONS, {"cache": OPTIONS})), family_models["llama"])


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "opt", "gpt_neox", "gpt2", "qwen3_moe"])
def test_every_family_saves_and_loads_its_policy(family, family_models, tmp_path):
    model = family_models[family]
    result = sparity.run(recipe(), model=model, output=tmp_path / "out", device="cpu")
    loaded = sparity.load(result.path)
    with sparity.cache(model, OPTIONS["policy"], 0.3, sinks=2, recent=3):
        expected = generated(model)
    assert torch.equal(generated(loaded), expected)
    sizes = [layer.store.lengths.tolist() for layer in loaded(IDS).past_key_values.layers if hasattr(layer, "store")]
    assert sizes
    assert all(set(lengths) == {12} for lengths in sizes)
    if family == "gemma2":
        assert sorted(float(keep) for keep in load_file(result.path / FILE).values()) == [0.3, 1.0, 1.0]


@torch.no_grad()
def test_what_is_stored_in_bits_and_read_by_pages_is_saved_too(family_models, tmp_path):
    more = {"store": {"kivi": {"bits": 4, "group": 4, "residual": 4}}, "read": {"quest": {"page": 4, "dense": 1}}}
    model = family_models["llama"]
    result = sparity.run(
        recipe({**OPTIONS, **more, "read_keep": 6}), model=model, output=tmp_path / "out", device="cpu"
    )
    with sparity.cache(model, OPTIONS["policy"], 0.3, sinks=2, recent=3, read_keep=6, **more):
        expected = generated(model)
    assert torch.equal(generated(sparity.load(result.path)), expected)
    past = sparity.load(result.path)(IDS).past_key_values
    assert [layer.store.packed.lengths.tolist() for layer in past.layers] == [[8] * 4] * 3
    assert [(layer.run.reader.page, layer.run.read_keep) for layer in past.layers] == [(4, 6.0)] * 3


def test_the_plan_says_what_is_kept(family_models):
    planned = plan(prepare(Recipe.read(recipe()), family_models["llama"]))
    assert planned.stages[0].words == "snapkv, 30 % of the cache"
    assert CacheStage(keep=512).words == "snapkv, 512 tokens of the cache"
    whole = CacheStage(store={"kivi": {"bits": 4}}, read={"quest": {"page": 32}}, read_keep=0.1)
    assert whole.how == "snapkv + kivi + quest"
    assert whole.words == (
        "snapkv, 25 % of the cache; kivi, 4 bits beside the last 128 tokens; quest, 10 % of the text read"
    )
    assert CacheStage(policy="quest", keep=0.1).words == "quest, 10 % of the text read"


def test_data_that_does_not_fit_stops_the_load(saved, family_models):
    stage, model = CacheStage.model_validate(OPTIONS), family_models["llama"]
    good = load_file(saved / FILE)
    first = next(iter(good))
    for data, words in (
        ({**good, first: torch.tensor(0.3)}, "is torch.float32"),
        ({**good, first: torch.tensor(-1.0).double()}, "not a share or a number"),
        ({**good, first: torch.tensor(torch.nan).double()}, "not a share or a number"),
        ({**good, "model.layers.9.self_attn.k_proj.keep": good[first]}, "holds the unknown model.layers.9"),
        ({name: keep for name, keep in good.items() if name != first}, f"lacks {first}"),
    ):
        with pytest.raises(CorruptFile, match=words) as error, stage.attach(model, input_sites(model), data):
            pass
        assert "fetch the folder again" in str(error.value)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("exact", [True, False])
def test_the_stage_says_whether_whole_layers_may_round(exact, saved):
    model, data = sparity.load(saved, runtime=False), load_file(saved / FILE)
    with CacheStage.model_validate(OPTIONS | {"exact": exact}).attach(model, input_sites(model), data):
        assert getattr(model, RUN).rounds(40) is not exact


def test_a_block_alone_has_no_cache(saved, family_models):
    block = family_models["llama"].model.layers[0]
    with CacheStage().attach(block, (), load_file(saved / FILE)):
        assert not block._forward_pre_hooks


def test_what_cannot_be_met_is_refused_before_any_work(family_models):
    for options, words in (
        ({"policy": "snapvk"}, 'no policy "snapvk"; did you mean "snapkv"'),
        ({"policy": {"snapkv": {"windw": 3}}}, 'policy "snapkv" has no option "windw"'),
        ({"keep": 20}, "is to keep 20 tokens, and 36 always stay"),
        ({"keep": 2.5}, "must be a share"),
        ({"decode": True}, "cannot evict while decoding"),
        ({"policy": {"h2o": {"mean": True}}}, "a run keeps sums"),
    ):
        with pytest.raises(InvalidInput, match=words):
            plan(prepare(Recipe.read(recipe(options)), family_models["llama"]))
    for options, words in (({"keep": 0}, "greater than 0"), ({"sinks": -1}, "greater than or equal to 0")):
        with pytest.raises(InvalidInput, match=words):
            Recipe.read(recipe(options))
    with pytest.raises(UnsupportedModel, match='no layer of this "mistral" sees the whole text'):
        plan(prepare(Recipe.read(recipe()), family_models["mistral"]))
