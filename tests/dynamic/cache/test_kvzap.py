"""KVzap: gates fitted to KVzip+'s scores, what they keep, and how they are saved, loaded and refused."""

import copy

import numpy as np
import pytest
import torch
from learned import learned_of
from safetensors.torch import load_file
from test_kvzip import attention_calls, rotated
from transformers import DynamicCache

import sparity
from sparity.dynamic.cache.gates import fitted_gates, ridge_of
from sparity.dynamic.cache.learned import Study
from sparity.dynamic.cache.stage import CacheStage
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.recipe import Recipe

IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
FILE = "sparity-dynamic/00-cache.safetensors"
ZAP = {"window": 4}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def test_a_ridge_regression_by_hand():
    inputs, targets = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[1.0], [5.0]]).double()
    # around the means 1 and 3: sum x^2 = 2, sum x y = 4, so the weight is 4 / (2 + ridge)
    assert ridge_of(inputs, targets, 2.0).tolist() == [[1.0, 2.0]]
    assert ridge_of(inputs, targets, 1e-12)[0].tolist() == pytest.approx([2.0, 1.0])


@torch.no_grad()
def test_gates_are_ridge_regressions_to_what_a_repetition_looks_at(model):
    texts = IDS[:, :12]
    found = fitted_gates(Study(Decoder.open(model), [True] * 3, texts), 0.5)
    past = DynamicCache(config=model.config)
    taken = attention_calls(model, texts.repeat(1, 2), past_key_values=past)
    for index, (module, named) in enumerate(taken):
        hidden, query = named["hidden_states"], rotated(module, named)
        keys = past.layers[index].keys.repeat_interleave(2, 1)
        hidden_from = torch.ones(24, 24, dtype=torch.bool).triu(1)
        weights = (query @ keys.transpose(2, 3) * module.scaling).masked_fill(hidden_from, -torch.inf).softmax(-1)
        values = past.layers[index].values.repeat_interleave(2, 1)
        project = module.o_proj.weight.T.view(4, 8, 32)
        size = torch.einsum("hij,bhti->bhtj", project, values).norm(dim=-1)
        scores = weights / hidden.norm(dim=-1)[:, None, :, None] * size[:, :, None]
        scores = scores[:, :, 12:, :12].amax(2).view(2, 2, 2, 12).amax(2).log()
        wanted = ridge_of(hidden[:, :12].flatten(0, 1).double(), scores.transpose(1, 2).flatten(0, 1).double(), 0.5)
        assert torch.allclose(found[index], wanted.float(), atol=1e-4)


def test_a_gate_scores_new_tokens_and_a_threshold_keeps_more_than_is_asked_for():
    states = [torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    hidden = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0, 0.0]).view(1, 6, 1)
    gate = torch.tensor([[1.0, 0.5], [-1.0, 0.0]])
    named = {"policy": "kvzap", "window": 1, "hidden": hidden, "gate": gate}
    assert sparity.score_cache(*states, **named)[0].tolist() == [
        [0.5, 3.5, 1.5, 2.5, -0.5, 0.5],
        [0.0, -3.0, -1.0, -2.0, 1.0, 0.0],
    ]
    kept = sparity.select_cache(*states, keep=2, **named)  # four in both heads: the last tokens, 3.5 and 2.5
    assert kept[0].int().tolist() == [[0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1]]
    kept = sparity.select_cache(*states, keep=2, threshold=0.5, **named)
    assert kept[0].int().tolist() == [[1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1]]
    for changed, words in (
        ({"gate": None}, "kvzap needs gate: float32"),
        ({"hidden": None}, "kvzap reads hidden states"),
        ({"gate": gate[:, :1]}, r"not float32 \[2, 2\]"),
        ({"gate": gate * torch.nan}, "not finite"),
        ({"hidden": hidden[:, 1:]}, r"hidden must be \[batch, new, hidden\]"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.score_cache(*states, **{**named, **changed})


@torch.no_grad()
def test_while_decoding_a_token_goes_when_it_leaves_the_window_if_it_scores_too_little(model):
    learned = learned_of(model, "kvzap")
    scores = []
    with sparity.cache(model, "kvzap", 8, threshold=-3.0, sinks=2, recent=2, **ZAP, **learned):
        past = model(IDS).past_key_values
        for step in range(5):
            model(IDS[:, step : step + 1], past_key_values=past)
    for layer in past.layers:
        for row in range(2):
            for head in range(2):
                places, mass = layer.store.segment(row, head)[2], layer.store.mass_of(row, head)
                assert places.tolist()[:2] == [0, 1]
                assert {*range(41, 45)} <= {*places.tolist()}
                scores.append(mass)
    held = [len(each) for each in scores]
    assert len({*held}) > 1  # heads keep what their tokens are worth
    assert sum(held) >= 3 * 2 * 2 * 8


@torch.no_grad()
def test_gates_are_saved_with_the_model_and_refused_for_another(family_models, token_files, tmp_path):
    model = family_models["llama"]
    options = {"policy": {"kvzap": ZAP}, "keep": 0.3, "sinks": 2, "recent": 2}
    recipe = {
        "stages": [{"cache": options}],
        "calibration": {"tokens": token_files["calibration"]},
        "measure": {"speed": None},
    }
    path = sparity.run(recipe, model=model, output=tmp_path / "out", device="cpu").path
    data = load_file(path / FILE)
    tokens = torch.from_numpy(np.load(token_files["calibration"]))
    learned = sparity.calibrate_cache(model, tokens, policy={"kvzap": ZAP})
    assert torch.equal(data["model.layers.2.self_attn.k_proj.gate"], learned[2]["gate"])
    with sparity.cache(model, options["policy"], 0.3, sinks=2, recent=2, learned=learned):
        expected = model(IDS).past_key_values
    past = sparity.load(path)(IDS).past_key_values
    assert [x.store.lengths.tolist() for x in past.layers] == [x.store.lengths.tolist() for x in expected.layers]
    name = "model.layers.1.self_attn.k_proj.gate"
    stage = CacheStage.model_validate(options)
    for changed, words in (
        ({**data, name: torch.zeros(2, 9)}, r"not float32 \[2, 33\]: of another model"),
        ({key: tensor for key, tensor in data.items() if key != name}, f"{name} is missing"),
    ):
        with pytest.raises(CorruptFile, match=words), stage.attach(model, input_sites(model), changed):
            pass
    planned = plan(prepare(Recipe.read(recipe), model))
    assert planned.stages[0].words == "kvzap, 30 % of the cache"
    with pytest.raises(InvalidInput, match="needs calibration text"):
        sparity.run({key: recipe[key] for key in ("stages", "measure")}, model=model, output=tmp_path / "none")


def test_a_run_without_what_is_learned_or_with_that_of_another_model_is_refused(model, family_models):
    good = learned_of(model, "kvzap")["learned"]
    for learned, words in (
        (None, r"kvzap learns from text: give learned=sparity\.calibrate_cache"),
        (good[:2], "is of 2 blocks, and the model has 3"),
        ([{**each, "gate": each["gate"][:, 1:]} for each in good], "block 0: gate is .*of another model"),
        ([{"centres": each["gate"]} for each in good], "is to know gate of each block, and `learned` holds centres"),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.cache(model, "kvzap", learned=learned):
            pass
    with (
        pytest.raises(InvalidInput, match="is to know nothing of each block"),
        sparity.cache(model, "snapkv", learned=good),
    ):
        pass
    for ids, words in ((torch.ones(2, 3).long(), "texts of 8 tokens or more"), (torch.ones(2), "must be texts")):
        with pytest.raises(InvalidInput, match=words):
            sparity.calibrate_cache(model, ids, policy="kvzap")
