"""Parts of a model that are switched off: every score, solver and budget of the registry takes them, and says so."""

import logging

import numpy as np
import pytest
import torch

import references
import sparity
from sparity import registry
from sparity.budgets.base import Site
from sparity.calibration import Statistics
from sparity.calibration.statistics import GRADIENTS, OUTPUT_GRAM, REGIONAL
from sparity.recipe import Recipe
from sparity.static.prune.pruning import Pruning

SCORES = registry.names("prune.score")
SOLVERS = registry.names("prune.solver")
PATTERNS = ("unstructured", "2:4", "block:4x4")
UNDAMPED = {"prune.solver": {"sparsegpt": {"damping": 0}}, "prune.score": {"obs": {"damping": 0}}}
FITTING = [  # single weights of a block may not change places
    (solver, pattern)
    for solver in SOLVERS
    for pattern in PATTERNS
    if not (registry.get("prune.solver", solver).exchanges and "block" in pattern)
]
GUESSES = ("magnitude", "random")  # they look at weights alone
FEWER = {  # steps of a search, on a whole model
    "sparse_swaps": {"swaps": 3},
    "alps": {"iterations": 5, "refinements": 2},
    "admm": {"iterations": 6, "rounds": 4},
    "thanos": {"block_columns": 32},
    "llm_surgeon": {"refinements": 3},
}


def layer(dead, rows=16, columns=32, scale=1.0):
    """A weight, its inputs with dead channels, and everything that is known of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(3, 2 * columns, columns, generator=generator) * scale
    inputs[..., dead] = 0
    statistics = Statistics.gather("layer", registry.names("statistic"))
    statistics.add(inputs)
    outputs = torch.randn(3, 2 * columns, rows, generator=generator)
    gradients = outputs.transpose(1, 2) @ inputs  # [samples, out, in]: zero where the input is
    squares = gradients.square().mean(0)
    known = {"gradient": gradients.mean(0), "gradient_square": squares, REGIONAL: squares}
    rows_of = outputs.flatten(0, 1)
    known[OUTPUT_GRAM] = rows_of.T @ rows_of / len(rows_of)
    return weight, inputs, statistics.with_gradients(known)


@pytest.fixture(scope="module")
def switched_off():
    """The small trained model with four parts that see only zeros, one of them in part, and calibration tokens."""
    model = sparity.load("zoo:llama")
    layers = model.model.layers[:4]
    model.model.layers, model.config.num_hidden_layers = layers, 4
    with torch.no_grad():
        layers[0].self_attn.v_proj.weight.zero_()  # attention's output
        layers[1].input_layernorm.weight.zero_()  # a whole block
        layers[1].post_attention_layernorm.weight.zero_()
        layers[2].mlp.up_proj.weight.zero_()  # the MLP's channels
        layers[3].self_attn.v_proj.weight[:32].zero_()  # one head
    return model


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "calibration.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (2, 16)))
    return {"tokens": str(path), "batch": 2}


ITEMS = [
    *({"score": score} for score in SCORES),
    *({"solver": {solver: FEWER.get(solver, {})}} for solver in SOLVERS),
    *({"solver": {solver: FEWER.get(solver, {})}, "score": "gblm"} for solver in SOLVERS),
    *({"budget": budget} for budget in registry.names("budget") if not registry.get("budget", budget).measures),
    {"score": UNDAMPED["prune.score"]},
    {"solver": UNDAMPED["prune.solver"]},
    {"compare_within": "global"},
    {"compare_within": "global", "pattern": "block:4x4", "score": "gradient"},
    {"order": "independent", "score": "taylor", "pattern": "2:4"},
    {"budget": {"knapsack": {"spread": 0.1, "step": 0.1, "samples": 1, "per": "block"}}, "score": "obd"},
    {"budget": {"evopress": {"generations": 2, "samples": 1, "per": "block"}}, "score": "wanda"},
    {"budget": {"block_greedy": {"step": 0.1, "samples": 1}}, "score": "wanda"},
    {"budget": {"greedy": {"spread": 0.1, "step": 0.1, "samples": 1, "per": "block"}}, "score": "fisher"},
]


@pytest.mark.parametrize("prune", ITEMS, ids=str)
def test_a_run_on_a_model_with_dead_parts_goes_on_and_says_so_once(switched_off, calibration, tmp_path, caplog, prune):
    chosen = Recipe.read({"calibration": calibration, "stages": [{"prune": prune}], "measure": {"speed": None}})
    with caplog.at_level(logging.WARNING):
        result = sparity.run(chosen, model=switched_off, output=tmp_path / "out", device="cpu")
    assert all(torch.isfinite(weight).all() for weight in result.model().state_dict().values())
    lines = [record.getMessage() for record in caplog.records if "on all calibration tokens" in record.getMessage()]
    needs = Pruning.of(prune.get("score"), prune.get("pattern", "unstructured"), prune.get("solver", "mask_only")).needs
    if not needs:
        assert lines == []
        return
    inputs_known = bool(needs - set(GRADIENTS))
    for name in ("layers.0.self_attn.o_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"):
        (line,) = [line for line in lines if name in line]
        assert ("every input is zero" if inputs_known else "the gradient is zero") in line
    assert sum("layers.2.mlp.down_proj" in line for line in lines) == 1
    assert not any("layers.3.self_attn.o_proj" in line for line in lines)
    assert "expert" not in caplog.text


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_thresholds_of_dead_parts_skip_what_is_zero_and_nothing_else(switched_off, calibration, tmp_path, sparsity):
    stages = [{"activations": {"sparsity": sparsity}}]
    chosen = Recipe.read({"calibration": calibration, "stages": stages, "measure": {"speed": None}})
    result = sparity.run(chosen, model=switched_off, output=tmp_path / "out", device="cpu")
    skipped = {change.name: change.skipped for change in result.report.candidates[0].changes}
    assert skipped["model.layers.0.self_attn.o_proj"] == skipped["model.layers.1.mlp.down_proj"] == 1.0
    assert sparsity <= skipped["model.layers.0.mlp.down_proj"] < 1


@pytest.mark.parametrize("score", [name for name in SCORES if name not in GUESSES])
@pytest.mark.parametrize("dead", [slice(0, 8), slice(5, 30), slice(None)], ids=["some", "most", "all"])
@pytest.mark.parametrize("damping", [None, 0])
def test_weights_that_read_zeros_go_first(score, dead, damping):
    weight, _, statistics = layer(dead)
    options = {"damping": damping} if damping is not None and score == "obs" else {}
    found = registry.create("prune.score", score, options).score(weight, statistics)
    alive = torch.ones(32, dtype=torch.bool)
    alive[dead] = False
    assert (found[:, dead] == 0).all()
    assert (found[:, alive] > 0).all()


@pytest.mark.parametrize(("solver", "pattern"), FITTING)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dead", [slice(0, 8), slice(5, 30), slice(None)], ids=["some", "most", "all"])
def test_a_solver_takes_dead_inputs_and_is_never_worse_than_zeroing(solver, score, pattern, dead):
    weight, inputs, statistics = layer(dead)
    for options in ({}, {"damping": 0.0}):
        options = options if solver in UNDAMPED["prune.solver"] else {}
        pruning = Pruning.of(score, pattern, {solver: options})
        pruned, keep = pruning.apply(weight, statistics, pruning.sparsity)
        assert torch.isfinite(pruned).all()
        assert torch.equal(pruned != 0, keep)
        zeroed = torch.where(keep, weight, 0.0)
        outputs = statistics.output_gradient_gram if OUTPUT_GRAM in pruning.solver.needs else None
        error, plain = (references.output_error(weight, found, inputs, outputs) for found in (pruned, zeroed))
        assert error <= plain * (1 + 1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-19, 1e-18])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_too_weak_to_be_squared_count_as_zero(scale, damping):
    weight, _, statistics = layer(slice(0, 8), scale=scale)
    for solver, score in (("sparsegpt", None), ("sparsegpt", "wanda"), ("mask_only", "obs")):
        options = {"damping": damping} if solver == "sparsegpt" else {}
        pruned, keep = Pruning.of(score, "unstructured", {solver: options}).apply(weight, statistics, 0.25)
        assert torch.isfinite(pruned).all()
        assert not keep[:, :8].any()


@pytest.mark.parametrize(
    ("name", "by_hand"), [("column_norm", True), ("gram", True), ("histogram", True), ("mean", False)]
)
def test_a_statistic_tells_whether_all_inputs_were_zero(name, by_hand):
    statistics = Statistics.gather("layer", [name])
    assert not statistics.silent  # nothing came
    statistics.add(torch.zeros(2, 3, 4))
    assert statistics.silent == by_hand
    statistics.add(torch.tensor([[0.0, 0.0, -1e-3, 0.0]]))
    assert not statistics.silent


@pytest.mark.parametrize("per", ["block", "layer"])
def test_owl_gives_up_most_of_what_sees_only_zeros(per):
    owl = registry.create("budget", "owl", {"per": per})
    weight, _, silent = layer(slice(None))
    weight[3, 3] = 50.0
    *_, alive = layer(slice(0, 0))
    found = {
        **owl.observe({"dead": weight}, {"dead": silent}),
        **owl.observe({"alive": weight}, {"alive": alive}),
    }
    assert found == {"dead": 0.0, "alive": pytest.approx(100 / weight.numel())}
    shares = owl.allocate([Site(name, 100.0, evidence=ratio) for name, ratio in found.items()], 0.5)
    assert shares["dead"] > shares["alive"]
