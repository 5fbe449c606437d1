"""Heals of skipped activations: what they are fitted to, that held-out text judges them, and that they are optional."""

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import DynamicCache

import sparity
from interruptions import Killed, dies_at
from packed_folders import logits
from sparity import registry
from sparity.dynamic.activations.divergence import divergence
from sparity.dynamic.activations.heals.base import Correction, Spot, spot_of
from sparity.dynamic.activations.heals.bias import Bias
from sparity.dynamic.activations.heals.low_rank import Lost, LowRank, reduced_rank
from sparity.dynamic.activations.places import places_of
from sparity.dynamic.activations.stage import Activations
from sparity.engine.modules.skips import SparseTokens, tokens_of
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.stages.base import Workload

FILE = "sparity-dynamic/01-activations.safetensors"
HEALS = registry.names("activations.heal")
OPTIONS = {"bias": {"steps": 12, "rate": 0.01}, "low_rank": {"share": 0.01}}
SKIPS = {"method": "teal", "sparsity": 0.6, "first": 1}
TEXT = {"text": "python-docs:calibration", "documents": "joined", "samples": 8, "length": 48}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ids(token_files):
    return torch.from_numpy(np.load(token_files["calibration"]))


@pytest.fixture(scope="module")
def trained():
    """The bundled model in float32, and tokens of a text."""
    recipe = {"model": "zoo:llama", "calibration": TEXT, "stages": [{"activations": {}}], "dtype": "float32"}
    return sparity.load("zoo:llama", dtype="float32"), prepare(sparity.Recipe.read(recipe), device="cpu").tokens


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), rank=st.integers(1, 4))
def test_reduced_rank_is_the_best_of_its_rank_by_the_published_formula(seed, rank):
    """Whitened by the inputs' covariance, the truncated SVD of the least-squares matrix (Izenman 1975)."""
    x, lost = drawn(200, 6, seed=seed).double(), drawn(200, 5, seed=seed + 1).double()
    x *= torch.linspace(0.3, 2, 6)
    lost += x @ drawn(6, 5, seed=seed + 2).double()
    gram = x.T @ x
    damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(6)
    values, vectors = torch.linalg.eigh(damped)
    root = vectors @ values.sqrt().diag() @ vectors.T
    best = torch.linalg.svd((x.T @ lost).T @ torch.linalg.inv(root), full_matrices=False)
    expected = best.U[:, :rank] @ best.S[:rank].diag() @ best.Vh[:rank] @ torch.linalg.inv(root)
    first, second = reduced_rank(gram, x.T @ lost, rank)
    assert first.shape == (rank, 6)
    assert second.shape == (5, rank)
    assert torch.allclose(second @ first, expected, atol=1e-8)


def test_what_is_lost_is_summed_over_sparse_tokens_by_hand(family_models):
    module = torch.nn.Linear(2, 3)
    place = places_of(family_models["llama"], input_sites(family_models["llama"]), ["q"])[0]
    lost = Lost(Spot(place, module), SparseTokens(first=1))
    x, left = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 0.5]]]), torch.tensor([[[9.0, 9.0], [0.0, 2.0], [3.0, 0.0]]])
    lost.before(module, (x,))
    lost.after(module, (left,))
    assert lost.gram.tolist() == [[10.0, 3.5], [3.5, 4.25]]
    assert lost.lost.tolist() == [[1.0, 1.5], [2.0, 0.25]]  # x times what is missing of (1, 2) and (3, 0.5)


def test_a_bias_moves_by_the_rate_in_units_of_the_outputs_in_one_step(family_models, ids):
    model = family_models["llama"]
    place = places_of(model, input_sites(model), ["down"])[1]
    sizes = []
    handle = place.module.register_forward_hook(
        lambda _, given, output: sizes.append(float(output.pow(2).mean().sqrt()))
    )
    with torch.no_grad():
        model(ids[:1])
    handle.remove()
    with sparity.with_activations(model, ids, **SKIPS) as sparse:
        (found,) = Bias(steps=1, rate=0.1).fit(sparse, [spot_of(place)], tokens_of(sparse), ids)
        whole = divergence(sparse, tokens_of(sparse), ids[:1])
    assert found["bias"].abs().mul(1 / (0.1 * sizes[0])).mean() == pytest.approx(1, abs=0.05)  # Adam's first step
    assert float(whole.detach()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("heal", HEALS)
def test_held_out_text_is_nearer_to_the_dense_model_and_the_model_stays_as_it_is(heal, trained):
    model, ids = trained
    dense, before = logits(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        of_prompt = model(ids[:1, :9], past_key_values=DynamicCache()).logits
    held = ids[-2:]
    losses = []
    for chosen in (None, {heal: OPTIONS[heal]}):
        with sparity.with_activations(model, ids, heal=chosen, **SKIPS) as sparse:
            losses.append(float(divergence(sparse, tokens_of(sparse), held).detach()))
            assert torch.equal(logits(copy.deepcopy(sparse)), logits(sparse))
            made = sparse.generate(ids[:1, :9], max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert made.shape == (1, 12)
            with torch.no_grad():  # a prompt is dense
                assert torch.equal(sparse(ids[:1, :9], past_key_values=DynamicCache()).logits, of_prompt)
    assert losses[1] < losses[0]
    assert torch.equal(logits(model), dense)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_dense_tokens_are_not_corrected():
    heal, tokens, module = Bias(), SparseTokens(first=2), torch.nn.Linear(3, 2)
    correction = Correction(heal, {"bias": torch.tensor([1.0, -1.0])}, tokens)
    x, y = drawn(1, 4, 3), drawn(1, 4, 2)
    correction.see(module, (x,))
    found = correction.add(module, (x,), y)
    assert torch.equal(found[:, :2], y[:, :2])
    assert torch.equal(found[:, 2:], y[:, 2:] + torch.tensor([1.0, -1.0]))
    correction.see(module, (x[:, :2],))
    assert correction.add(module, (x[:, :2],), y[:, :2]) is not None
    wide = LowRank()
    tensors = {"first": drawn(1, 3), "second": drawn(2, 1)}
    assert torch.allclose(wide.correction(tensors, x), x @ tensors["first"].T @ tensors["second"].T)


@pytest.mark.parametrize("heal", HEALS)
def test_one_that_does_not_help_is_left_out(heal, family_models, ids, monkeypatch, caplog):
    model, kind = family_models["llama"], registry.get("activations.heal", heal)
    own = kind.fit

    def harmful(self, *arguments):
        return [
            {name: 100 * torch.ones_like(tensor) for name, tensor in found.items()} for found in own(self, *arguments)
        ]

    with sparity.with_activations(model, ids, **SKIPS) as sparse:
        expected = logits(sparse)
    monkeypatch.setattr(kind, "fit", harmful)
    with (
        caplog.at_level(logging.INFO, logger="sparity"),
        sparity.with_activations(model, ids, heal={heal: OPTIONS[heal]}, **SKIPS) as sparse,
    ):
        assert torch.equal(logits(sparse), expected)
    assert "on 1 held-out sequences" in caplog.text
    assert caplog.text.rstrip().endswith("left out")


@pytest.mark.parametrize(("method", "sites"), [("cats", None), ("dejavu", ["heads", "neurons"]), ("larosa", None)])
def test_a_bias_works_behind_every_kind_of_place(method, sites, family_models, ids):
    model = family_models["llama"]
    chosen = {"bias": {"steps": 4, "rate": 0.005}}
    losses = []
    for heal in (None, chosen):
        with sparity.with_activations(model, ids, method=method, sparsity=0.6, sites=sites, heal=heal) as sparse:
            losses.append(float(divergence(sparse, tokens_of(sparse), ids[-1:]).detach()))
    assert losses[1] <= losses[0]


@pytest.mark.parametrize("heal", HEALS)
def test_a_run_keeps_it_in_its_file_and_goes_on_where_it_was_killed(heal, trained, tmp_path):
    stage = {**SKIPS, "heal": {heal: OPTIONS[heal]}}
    recipe = sparity.Recipe.read(
        {
            "model": "zoo:llama",
            "dtype": "float32",
            "calibration": TEXT,
            "stages": [{"prune": {"score": "magnitude", "sparsity": 0.3}}, {"activations": stage}],
            "measure": {"speed": None},
        }
    )
    whole = sparity.run(recipe, output=tmp_path / "whole", device="cpu")
    expected, data = (whole.path / FILE).read_bytes(), load_file(whole.path / FILE)
    names = {"bias": {"heal_bias"}, "low_rank": {"heal_first", "heal_second"}}[heal]
    assert {name.rpartition(".")[2] for name in data} == {"threshold", *names}
    activations, decoder = recipe.stages[1], Decoder.open(whole.path)
    planned = activations.estimate(decoder, activations.decide(decoder, None), Workload(8, 48)).runtime_bytes
    assert planned == sum(tensor.nbytes for tensor in data.values())
    for count in (24, 27):  # while the last blocks are fitted, and when all of them are
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            with pytest.raises(Killed):
                sparity.run(recipe, output=tmp_path / str(count), device="cpu")
        resumed = sparity.run(recipe, output=tmp_path / str(count), device="cpu", resume=True)
        assert (resumed.path / FILE).read_bytes() == expected
    model = whole.model()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(sparity.load(tmp_path / "saved")), logits(model))
    pruned = sparity.load(whole.path, runtime=False)
    with sparity.with_activations(pruned, trained[1], heal={heal: OPTIONS[heal]}, **SKIPS) as sparse:
        assert torch.allclose(logits(sparse), logits(model), atol=1e-3)


def test_what_cannot_be_is_refused(family_models, ids):
    model = family_models["llama"]
    for options, words in (
        (
            {"heal": "low_rank", "method": "cats", "sites": None},
            "low_rank works behind input or hidden, not behind gate",
        ),
        ({"heal": {"bias": {"steps": 0}}}, "steps and rate must be positive"),
        ({"heal": {"low_rank": {"share": 1}}}, "must lie between 0 and 1"),
        ({"heal": "balm"}, 'no heal "balm"'),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.with_activations(model, ids, **{**SKIPS, **options}):
            pass
    with (
        pytest.raises(InvalidInput, match="judged on others: give 2 or more"),
        sparity.with_activations(model, ids[:1], heal="bias", **SKIPS),
    ):
        pass
    stage, sites = Activations(heal="bias", sparsity=0.5, sites=["q"]), input_sites(model)
    data = {f"{place.name}.threshold": torch.tensor(1.0) for place in places_of(model, sites, ["q"])}
    first = next(iter(data)).removesuffix(".threshold")
    for name, tensor, words in (
        ("heal_bias", torch.zeros(3), r"heal|bias is float32 \[3\]"),
        ("heal_blas", torch.zeros(32), "unknown blas|lacks bias"),
    ):
        with pytest.raises(CorruptFile, match=words), stage.attach(model, sites, {**data, f"{first}.{name}": tensor}):
            pass
    without = Activations(sparsity=0.5, sites=["q"])
    with (
        pytest.raises(CorruptFile, match="unknown heal_bias"),
        without.attach(model, sites, {**data, f"{first}.heal_bias": torch.zeros(32)}),
    ):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_with_nothing_skipped_there_is_nothing_to_heal(family_models, ids):
    model = family_models["llama"]
    dense = logits(model)
    with sparity.with_activations(model, ids, method="teal", sparsity=0.0, heal="bias") as sparse:
        assert torch.equal(logits(sparse), dense)


@pytest.mark.parametrize("better", [True, False])
def test_centres_are_kept_where_they_help(trained, better, monkeypatch):
    """The guard of SCAP takes the centres or none, for all places, by KL on the last fourth of the sequences."""
    model, tokens = trained
    if not better:  # centres that nothing lies around
        monkeypatch.setattr("sparity.dynamic.activations.methods.scap.densest", lambda *_, **__: 3.0)
    found, losses = {}, {}
    for name, options in (("mode", {}), ("zero", {"centre": "zero"}), ("guarded", {"guard": True})):
        with sparity.with_activations(
            model, tokens, method="scap", sparsity=0.5, sites=["down"], first=1, **options
        ) as sparse:
            found[name] = logits(sparse)
            losses[name] = sum(float(divergence(sparse, tokens_of(sparse), ids[None])) for ids in tokens[-2:])
    nearest = min(("mode", "zero"), key=losses.__getitem__)
    assert better or nearest == "zero"
    assert torch.equal(found["guarded"], found[nearest])
    assert not torch.equal(found["mode"], found["zero"])


def test_a_guarded_run_keeps_one_version(trained, tmp_path):
    recipe = {
        "model": "zoo:llama",
        "calibration": TEXT,
        "stages": [{"activations": {"method": {"scap": {"guard": True}}, "sparsity": 0.5, "sites": ["down"]}}],
        "measure": {"speed": None},
    }
    result = sparity.run(recipe, output=tmp_path / "out", device="cpu")
    (file,) = (tmp_path / "out/sparity-dynamic").glob("*.safetensors")
    names = {key.rpartition(".")[2] for key in load_file(file)}
    assert names in ({"threshold"}, {"threshold", "centre"})
    assert result.model() is not None
