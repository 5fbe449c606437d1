"""Thresholds of activations: by hand, as they are measured, and as they act in a whole model."""

import math

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import sparity
from packed_folders import TOKENS, logits
from sparity import registry
from sparity.calibration import walk
from sparity.calibration.evidence import LiveSequential
from sparity.dynamic.activations.places import places_of
from sparity.dynamic.activations.stage import Activations
from sparity.engine.decoding.model import declines
from sparity.engine.kernels import native
from sparity.engine.modules.skips import InputSkip
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.recipe import Recipe
from sparity.stages.base import Workload

FILE = "sparity-dynamic/00-activations.safetensors"
DENSE_FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "opt", "gpt_neox", "gpt2")
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"


def recipe(token_files, options=None, **sections):
    return {
        "calibration": {"tokens": token_files["calibration"], "batch": 6},
        "stages": [{"activations": options or {}}],
        "measure": {"speed": None},
        **sections,
    }


# ---- in a model


def by_hand(model, thresholds):
    """The model with every projection's input masked in its own forward, without hooks, from the fifth token on."""

    def forward(layer, threshold):
        def run(x):
            late = (torch.arange(x.shape[-2]) % TOKENS.shape[1] >= 4)[
                :, None
            ]  # OPT's MLP sees all rows one after the other
            x = torch.where(late & ~(x.abs() > threshold), torch.zeros_like(x), x)
            if isinstance(layer, Conv1D):
                flat = torch.addmm(layer.bias, x.view(-1, x.shape[-1]), layer.weight)
                return flat.view(*x.shape[:-1], layer.nf)
            return functional.linear(x, layer.weight, layer.bias)

        return run

    for name, threshold in thresholds.items():
        projection = name.removesuffix(".threshold")
        try:
            layer = model.get_submodule(projection)
        except AttributeError:  # a part of a fused matrix
            layer = model.get_submodule(projection.rpartition(".")[0])
        layer.forward = forward(layer, threshold)
    return model


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_a_run_gives_the_model_that_is_masked_by_hand(family, family_models, token_files, tmp_path):
    out = sparity.run(recipe(token_files), model=family_models[family], output=tmp_path / "out").path
    thresholds = load_file(out / FILE)
    decoder = Decoder.open(out)
    places = [place for i in range(len(decoder)) for place in places_of(decoder.skeleton, decoder.sites(i), "all")]
    names = [place.name for place in places]
    assert sorted(thresholds) == sorted(f"{name}.threshold" for name in names)
    assert {(t.dtype, t.shape) for t in thresholds.values()} == {(torch.float32, ())}
    dense = sparity.load(out, runtime=False)
    assert torch.equal(logits(dense), logits(family_models[family]))
    found = logits(sparity.load(out))
    assert not torch.equal(found, logits(dense))
    assert torch.equal(found, logits(by_hand(dense, thresholds)))


def test_the_share_that_is_skipped_is_measured(family_models, token_files, tmp_path):
    model = family_models["llama"]
    plan_ = recipe(token_files, {"sparsity": 0.3})
    result = sparity.run(plan_, model=model, output=tmp_path / "out")
    thresholds = load_file(result.path / FILE)
    tokens = prepare(Recipe.read(plan_), model).tokens
    inputs = {}
    handles = [
        model.get_submodule(change.name).register_forward_pre_hook(
            lambda _, arguments, name=change.name: inputs.update({name: arguments[0].abs()})
        )
        for change in result.report.candidates[0].changes
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    assert len(handles) == 21
    for change in result.report.candidates[0].changes:
        below = inputs[change.name] <= thresholds[f"{change.name}.threshold"]
        assert change.skipped == pytest.approx(float(below.double().mean()), abs=1e-4)
        assert 0.3 <= change.skipped < 0.32
        assert (change.target, change.zeros, change.shape_after) == (0.3, 0.0, tuple(change.shape_before))


def test_the_zoo_model_answers_otherwise_and_no_nonsense(tmp_path):
    text = {"text": "python-docs:calibration", "documents": "joined", "samples": 4, "length": 64, "batch": 4}
    measure = {"perplexity": ["python-docs:held-out"], "window": 64, "windows": 4, "speed": None}
    result = sparity.run(
        {"model": "zoo:llama", "calibration": text, "stages": [{"activations": {}}], "measure": measure},
        output=tmp_path / "out",
    )
    (quality,) = result.report.candidates[0].quality
    assert quality.dense_perplexity < quality.perplexity < 1.5 * quality.dense_perplexity
    assert quality.kl > 0


def test_nothing_to_skip_is_the_dense_model_bit_for_bit(family_models, token_files, tmp_path):
    model = family_models["llama"]
    out = sparity.run(recipe(token_files, {"sparsity": 0}), model=model, output=tmp_path / "out").path
    assert {float(threshold) for threshold in load_file(out / FILE).values()} == {0.0}
    loaded = sparity.load(out)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(module._forward_pre_hooks for module in loaded.modules())


def test_sites_that_are_left_out_stay_dense(family_models, token_files, tmp_path):
    options = {"sites": ["down", "q"], "sparsity": 0.5}
    result = sparity.run(recipe(token_files, options), model=family_models["llama"], output=tmp_path / "out")
    assert len(load_file(result.path / FILE)) == 6
    assert {change.role for change in result.report.candidates[0].changes} == {"down", "q"}
    named = sparity.load(result.path).named_modules()
    hooked = [
        name for name, module in named if any(isinstance(h, InputSkip) for h in module._forward_pre_hooks.values())
    ]
    assert hooked == [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]


# ---- attach and take off


def test_attached_then_detached_is_the_model_that_it_was(family_models, token_files, tmp_path):
    out = sparity.run(recipe(token_files), model=family_models["llama"], output=tmp_path / "out").path
    model, data = sparity.load(out, runtime=False), load_file(out / FILE)
    before, stage, sites = logits(model), Activations(), input_sites(model)
    with stage.attach(model, sites, data):
        assert torch.equal(logits(model), logits(sparity.load(out)))
    assert torch.equal(logits(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="in between"), stage.attach(model, sites, data):
        raise RuntimeError("in between")
    assert torch.equal(logits(model), before)


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
def test_a_packed_model_decodes_on_the_fast_path_with_its_stages(token_files, tmp_path):
    speed, stages = {"prompt": 4, "tokens": 2, "rounds": 1}, [{"prune": {"score": "magnitude"}}, {"activations": {}}]
    content = recipe(token_files, stages=stages, measure={"speed": speed}, output={"format": "packed"})
    content |= {"model": "zoo:llama", "dtype": "bfloat16"}
    result = sparity.run(content, output=tmp_path / "out")
    assert not any("not on the engine's fast path" in note for note in result.report.candidates[0].notes)
    assert declines(sparity.load(result.path)) is None


DAMAGE = {
    "lacks model.layers.0.self_attn.q_proj": {f"{QUERY}.threshold": None},
    "holds the unknown more.threshold": {"more.threshold": torch.tensor(1.0)},
    "float64": {f"{QUERY}.threshold": torch.tensor(1.0, dtype=torch.float64)},
    r"\[1\]": {f"{QUERY}.threshold": torch.tensor([1.0])},
    "holds nan": {f"{DOWN}.threshold": torch.tensor(math.nan)},
    "holds -1.0": {f"{DOWN}.threshold": torch.tensor(-1.0)},
    r"centre is float32 \[3\]": {f"{DOWN}.centre": torch.zeros(3)},
    "centre is not finite": {f"{QUERY}.centre": torch.full((32,), math.inf)},
    "has both rms and kept": {f"{QUERY}.rms": torch.tensor(1, dtype=torch.uint8), f"{QUERY}.kept": torch.tensor(3)},
    r"kept is 33, not 1 to 32": {f"{QUERY}.kept": torch.tensor(33)},
    "deviations is nan": {f"{QUERY}.deviations": torch.tensor(math.nan, dtype=torch.float64)},
    "has the unknown limit": {f"{QUERY}.limit": torch.tensor(1.0)},
}


@pytest.mark.parametrize("words", DAMAGE)
def test_data_that_does_not_fit_is_refused_and_nothing_is_attached(words, family_models):
    model = family_models["llama"]
    sites = input_sites(model)
    sound = {f"{p.name}.threshold": torch.tensor(0.1) for site in sites for p in site.projections}
    data = {name: tensor for name, tensor in {**sound, **DAMAGE[words]}.items() if tensor is not None}
    with pytest.raises(CorruptFile, match=words), Activations().attach(model, sites, data):
        raise AssertionError
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- decisions, plans, refusals


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("mixtral", {}, "one of several experts in one module.*come later"),
        ("qwen3_moe", {"sites": ["q"]}, "come later"),
        ("llama", {"sites": ["dwn"]}, r'no projection has the role "dwn"; did you mean "down"\? \(roles: q, k, v, o,'),
        ("phi3", {"sites": ["q"]}, "q, k, v are one matrix in this model"),
        ("gpt2", {"sites": ["o", "q", "v"]}, "name all of them or none"),
    ],
)
def test_a_model_that_it_does_not_fit_is_refused_before_any_work(family, options, words, family_models, token_files):
    with pytest.raises(InvalidInput, match=words):
        prepare(Recipe.read(recipe(token_files, options)), family_models[family])


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 1}, {"sparsity": -0.1}, {"sparsity": math.nan}, {"sparsity": True}, {"sites": []}, {"role": ["q"]}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        Activations.model_validate(options)


def test_it_needs_calibration_and_stands_last(family_models, token_files):
    with pytest.raises(InvalidInput, match=r"activations \(teal, 40 %\) needs calibration text"):
        prepare(Recipe.read(recipe(token_files, calibration=None)), family_models["llama"])
    stages = [{"activations": {}}, {"prune": {}}]
    with pytest.raises(InvalidInput, match="put prune before activations"):
        prepare(Recipe.read(recipe(token_files, stages=stages)), family_models["llama"])


def test_the_plan_says_what_is_skipped_and_how_many_bytes_it_takes(family_models, token_files, tmp_path):
    model, plan_ = family_models["llama"], recipe(token_files, {"sparsity": 0.25})
    (stage,) = plan(prepare(Recipe.read(plan_), model)).stages
    assert (stage.words, stage.statistics) == ("teal, 25 %", ("histogram",))
    assert {change.target for change in stage.changes} == {change.skipped for change in stage.changes} == {0.25}
    estimate = Activations().estimate(
        Decoder.open(model), Activations().decide(Decoder.open(model), None), Workload(1, 8)
    )
    out = sparity.run(plan_, model=model, output=tmp_path / "out").path
    assert estimate.runtime_bytes == sum(t.nbytes for t in load_file(out / FILE).values()) == 84


@pytest.mark.parametrize("method", [*registry.names("activations.method"), {"r_sparse": {"rho": 0.8}}], ids=str)
def test_the_plan_knows_the_bytes_of_every_method(family_models, method):
    """At the places where the method works of itself, two thirds skipped in the first block and a half in others."""
    model = family_models["llama"]
    stage, decoder = Activations(method=method, sparsity=0.5), Decoder.open(model)
    decision = stage.decide(decoder, None)
    first = [name for name in decision["sparsity"] if ".0." in name]
    decision["sparsity"].update(dict.fromkeys(first, 0.66))
    decision["sparsity"][first[-1]] = 0.0
    evidence, fitted = LiveSequential(stage.needs().statistics), {}
    for visit in walk(decoder, decoder.inputs(torch.arange(48).view(2, 24), 1)):
        fitted.update(stage.fit(decoder, evidence.for_block(visit), decision).tensors)
    planned = stage.estimate(decoder, decision, Workload(2, 24)).runtime_bytes
    assert planned == sum(tensor.nbytes for tensor in fitted.values())


def test_verify_finds_a_decision_that_is_not_the_options(family_models):
    stage, decoder = Activations(sparsity=0.3), Decoder.open(family_models["llama"])
    decision = stage.decide(decoder, None)
    with decoder.block(0) as block:
        assert stage.verify(block, decision) == []
        decision["sparsity"][QUERY] = 0.9
        assert stage.verify(block, decision) == [f"{QUERY}: recorded to skip 0.9 of its channels, not 0.3"]
        del decision["sparsity"][QUERY]
        assert stage.verify(block, decision) == [f"{QUERY}: recorded to skip None of its channels, which is no share"]
