"""`sparity.with_activations` with budgets that measure: what a run decides, and never worse than uniform."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparity
from packed_folders import logits
from sparity.dynamic.activations.stage import Activations
from sparity.engine.kernels import choice_file
from sparity.engine.modules.skips import skip_of
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.stages import kernel_time
from sparity.stages.evidence_in_memory import EvidenceInMemory

BUDGETS = {
    "block_greedy": {"samples": 2, "step": 0.1},
    "evopress": {"samples": 4, "generations": 2, "offspring": 3, "survivors": 2},
    "greedy": {"samples": 2, "step": 0.2, "spread": 0.2},
    "knapsack": {"samples": 2, "step": 0.2, "spread": 0.2},
    "owl": {},
}
SITES = ["gate", "o", "down"]


@pytest.fixture
def ids(token_files):
    return torch.from_numpy(np.load(token_files["calibration"]))


@pytest.mark.parametrize("budget", BUDGETS)
def test_it_is_what_a_run_with_the_same_tokens_decides(budget, family_models, token_files, ids, tmp_path):
    model, chosen = family_models["llama"], {budget: BUDGETS[budget]}
    dense = logits(model)
    stage = {"method": "wina", "sparsity": 0.5, "budget": chosen, "sites": SITES}
    calibration = {"tokens": token_files["calibration"]}
    recipe = {"calibration": calibration, "stages": [{"activations": stage}], "measure": {"speed": None}}
    result = sparity.run(sparity.Recipe.read(recipe), model=model, output=tmp_path / "out", device="cpu")
    with sparity.with_activations(model, ids, method="wina", sparsity=0.5, budget=chosen, sites=SITES) as sparse:
        assert torch.equal(logits(sparse), logits(result.model()))
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("budget", ["block_greedy", "evopress", "greedy", "knapsack"])
def test_no_worse_than_uniform_on_the_text_that_it_measured(budget, family_models, ids):
    decoder = Decoder.open(family_models["llama"])
    stage = Activations(sparsity=0.5, budget={budget: BUDGETS[budget]}, sites=SITES)
    with EvidenceInMemory(decoder, stage, ids) as known:
        found = stage.decide(decoder, known)["sparsity"]
        uniform = dict.fromkeys(found, 0.5)
        sizes = {name: decoder.skeleton.get_submodule(name).weight.numel() for name in found}
        assert len(set(found.values())) > 1
        total = sum(sizes.values())
        assert sum(sizes[name] * share for name, share in found.items()) / total == pytest.approx(0.5, abs=1e-6)
        if budget != "block_greedy":
            assert known.trial({"sparsity": found}) <= known.trial({"sparsity": uniform})
        for block in range(3 if budget == "block_greedy" else 0):
            errors = [known.block_error(block, {"sparsity": shares}) for shares in (found, uniform)]
            assert errors[0] <= errors[1]


def test_what_cannot_be_measured_is_refused_and_nothing_is_left(family_models, ids):
    model = family_models["llama"]
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with (
        pytest.raises(InvalidInput, match="give samples of 2 tokens or more"),
        sparity.with_activations(model, ids[:, :1], method="teal", sparsity=0.5, budget="knapsack"),
    ):
        pass
    with (
        pytest.raises(InvalidInput, match=r"step 0\.9 and spread 0\.3"),
        sparity.with_activations(model, ids, method="teal", sparsity=0.5, budget={"greedy": {"step": 0.9}}),
    ):
        pass
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


# ---- milliseconds


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A timer by which a product takes its weights in nanoseconds, and one by columns half of that and what counts."""
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path))
    monkeypatch.setattr(choice_file, "_known", {})
    kernel_time.timed.cache_clear()
    seen = []

    def timer(calls):
        assert calls.keys() == {"columns", "dense"}
        call = calls["columns"]
        weights, (x,) = math.prod(call.func.packed.shape), call.args
        counts = float((x != 0).double().mean())
        seen.append((call.func.packed.shape, round(1 - counts, 2)))
        return {"dense": weights * 1e-9, "columns": weights * 1e-9 * (0.5 + counts)}

    monkeypatch.setattr(kernel_time, "default_timer", lambda: timer)
    yield seen
    kernel_time.timed.cache_clear()


def test_times_are_those_of_weights_by_column_or_of_dense_ones_where_these_are_faster(clock):
    for share, milliseconds in ((0.0, 6.4e-3), (0.3, 6.4e-3), (0.5, 6.4e-3), (0.8, 0.7 * 6.4e-3)):
        found = kernel_time.milliseconds(64, 100, torch.bfloat16, share, "inputs")
        assert found == pytest.approx(milliseconds)
    assert {shape for shape, _ in clock} == {(64, 100)}
    assert {share for _, share in clock} >= {0.0, 0.5}  # exactly those shares of the channels are 0


@settings(max_examples=5, deadline=None)
@given(sparsity=st.sampled_from([0.6, 0.7, 0.8]))
def test_a_token_takes_no_longer_than_with_the_uniform_shares(sparsity):
    """By a clock that pays for skipping in wide inputs only: the down projections skip more, the others less."""
    model = sparity.load("zoo:llama")
    decoder = Decoder.open(model)

    def milliseconds(rows, columns, dtype, share, gone):
        assert gone == "inputs"
        return rows * columns * (1 - share if columns > 200 else 1.0)

    stage = Activations(
        sparsity=sparsity,
        sites=["gate", "down"],
        budget={"knapsack": {"cost": "milliseconds", "samples": 1, "step": 0.1, "spread": 0.1}},
    )
    tokens = torch.arange(48).view(2, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparity.dynamic.activations.fitting.milliseconds", milliseconds)
        with EvidenceInMemory(decoder, stage, tokens) as known:
            found = stage.decide(decoder, known)["sparsity"]

    def taken(shares):
        weights = {name: decoder.skeleton.get_submodule(name).weight for name in shares}
        return sum(milliseconds(*weights[name].shape, None, share, "inputs") for name, share in shares.items())

    assert taken(found) <= taken(dict.fromkeys(found, sparsity)) * (1 + 1e-9)
    assert all(found[name] == 0 for name in found if name.endswith("gate_proj"))  # nothing is gained there
    assert any(found[name] > 0 for name in found if name.endswith("down_proj"))


def test_neurons_whose_rows_are_skipped_too_have_no_time(family_models, ids, monkeypatch):
    budget = {"knapsack": {"cost": "milliseconds", "samples": 1}}
    with (
        pytest.raises(InvalidInput, match=r"not known how long .*gate_proj takes"),
        sparity.with_activations(
            family_models["llama"], ids, method="cats", sparsity=0.5, sites="gate_output", budget=budget
        ),
    ):
        pass
    monkeypatch.setenv("SPARITY_CHOICE", "rules")
    with (
        pytest.raises(InvalidInput, match="SPARITY_CHOICE=rules turns off"),
        sparity.with_activations(family_models["llama"], ids, method="teal", sparsity=0.5, budget=budget),
    ):
        pass


def test_the_hooks_hold_the_shares_of_the_budget(family_models, ids):
    model = family_models["llama"]
    budget = {"log_depth": {"first": 0.3, "last": 0.7}}
    with sparity.with_activations(model, ids, method="wina", sparsity=0.5, budget=budget, sites=["gate"]):
        kept = [skip_of(layer.mlp.gate_proj).rule.kept for layer in model.model.layers]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3
