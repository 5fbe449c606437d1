"""DejaVu's predictors of heads, and predictors that read what the block before reads."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sparity
from interruptions import Killed, dies_at
from packed_folders import logits
from sparity import registry
from sparity.calibration import walk
from sparity.calibration.evidence import LiveIndependent, LiveSequential
from sparity.dynamic.activations.fitting import Together, seen_together
from sparity.dynamic.activations.methods.base import Seen
from sparity.dynamic.activations.neuron_predictor import Predictor, trained
from sparity.dynamic.activations.places import places_of
from sparity.dynamic.activations.predicted_skips import HeadSkip, InputNote
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.stages.base import Workload

IDS = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))
FILE = "sparity-dynamic/00-activations.safetensors"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads_of(model):
    return places_of(model, input_sites(model), "heads")


def watched(model, modules, ids=IDS):
    """What each of these modules reads."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].detach()}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_heads_that_are_not_named_are_0_by_hand():
    note, tokens = InputNote(), SparseTokens(first=1)
    identity = Predictor(torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), 1)
    skip = HeadSkip(identity, 2, tokens, note)
    reads = torch.tensor([[[9.0, 0, 0], [0, 5, 1], [0, 1, 2]]])  # of which the first token is dense
    outputs = torch.arange(1.0, 19.0).view(1, 3, 6)
    outputs[0, 2, 0] = math.nan
    note(None, (reads,))
    (masked,) = skip(None, (outputs,))
    assert masked[0, :2].tolist() == [[1, 2, 3, 4, 5, 6], [0, 0, 9, 10, 0, 0]]
    assert masked[0, 2, 1:].tolist() == [0, 0, 0, 17, 18]
    assert masked[0, 2, 0].isnan()
    note(None, (reads[:, :1],))
    assert skip(None, (outputs[:, :1],)) is None


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "phi3"])
def test_of_every_family_the_outputs_of_heads_that_are_not_named_are_0(family, family_models):
    model = family_models[family]
    dense, place = logits(model), heads_of(model)[1]
    assert [projection.role for projection in place.saves] == (["o"] if family == "gpt_neox" else ["q", "o"])
    options = {"method": "dejavu", "sparsity": 0.5, "sites": "heads", "first": 2}
    with sparity.with_activations(model, IDS, **options) as sparse:
        modules = {"reads": place.reads[0].module, "gives": place.module}
        (skip,) = (hook for hook in place.module._forward_pre_hooks.values() if isinstance(hook, HeadSkip))
        seen = watched(sparse, modules)
        found = logits(sparse)
        assert torch.equal(logits(copy.deepcopy(sparse)), found)
    named = skip.predictor.keep(seen["reads"])
    heads = seen["gives"].view(2, 24, 4, 8)
    assert (named.sum(-1) == 2).all()
    assert bool((heads[:, 2:][~named[:, 2:]] == 0).all())
    assert bool((heads[:, 2:][named[:, 2:]] != 0).any())
    assert bool((heads[:, :2][~named[:, :2]] != 0).any())  # the first tokens are dense
    assert torch.equal(logits(model), dense)
    assert not torch.equal(found, dense)


def test_places_are_seen_token_by_token_and_the_norms_are_those_of_each_heads_output(family_models):
    model = family_models["llama"]
    decoder, attention = Decoder.open(model), model.model.layers[1].self_attn
    wanted = watched(model, {"q": attention.q_proj, "o": attention.o_proj})
    for source in (LiveSequential(frozenset()), LiveIndependent(frozenset())):
        for visit in walk(decoder, decoder.inputs(IDS, 1)):
            if visit.block.index == 1:
                place = places_of(visit.block.module, visit.block.sites, "heads")[0]
                inputs = source.for_block(visit).inputs([place.site, place.gives], 48)
                few = source.for_block(visit).inputs([place.site], 5)
    assert torch.allclose(inputs[place.site.name], wanted["q"].reshape(48, 32), atol=1e-5)
    assert torch.equal(few[place.site.name], inputs[place.site.name][:5])
    seen = seen_together(place, Together(inputs, drawn(48, 32)))
    assert torch.allclose(seen.head_norms, wanted["o"].reshape(48, 4, 8).norm(dim=-1), atol=1e-5)
    assert torch.equal(seen.read, drawn(48, 32))
    assert torch.equal(seen_together(place, Together(inputs)).read, inputs[place.site.name])


def test_a_predictor_of_heads_learns_what_the_input_says_of_them():
    x = drawn(1000, 16)
    norms = x @ drawn(16, 8, seed=1) + 50
    statistics = sparity.calibration.Statistics.gather("site", ())
    seen = Seen(statistics, None, None, x, ("q",), head_norms=norms)
    method = registry.build("activations.method", {"dejavu": {"labelled": 0.25, "rank": 16}})
    found = method.fit(seen, 0.75)
    assert int(found["kept"]) == 2
    named = method.mask(found, x[None])[0]
    assert (named.sum(-1) == 2).all()
    largest = torch.zeros_like(named).scatter(1, norms.topk(2).indices, True)
    assert float(named[largest].double().mean()) == pytest.approx(float(found["recall"]), abs=0.05)
    assert float(found["recall"]) > 0.85
    assert "ahead" not in found


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_with_lookahead_a_block_goes_by_what_the_one_before_reads(family, family_models):
    model = family_models[family]
    dense = logits(model)
    options = {"method": "dejavu", "sparsity": 0.5, "sites": ["heads", "neurons"], "lookahead": True, "first": 0}
    places = {
        (place.kind, int(place.name.split(".layers.")[1][0])): place
        for place in places_of(model, input_sites(model), ["neurons", "heads"])
    }
    assert [place.before is None for place in places.values()] == [True, True, False, False, False, False]
    with sparity.with_activations(model, IDS, **options) as sparse:
        for (kind, block), place in places.items():
            above = places[kind, max(block - 1, 0)]
            modules = {"reads": above.reads[0].module, "gives": place.saves[-1].module}
            seen = watched(sparse, modules)
            hooks = place.module._forward_pre_hooks if kind == "heads" else place.reads[0].module._forward_hooks
            (predictor,) = (hook.predictor for hook in hooks.values() if hasattr(hook, "predictor"))
            named = predictor.keep(seen["reads"].view(2, 24, -1))
            wide = named.repeat_interleave(8, -1) if kind == "heads" else named
            assert bool((seen["gives"].view(2, 24, -1)[~wide] == 0).all()), (kind, block)
            assert bool((seen["gives"].view(2, 24, -1)[wide] != 0).any()), (kind, block)
        whole = sparse(IDS).logits
        assert torch.allclose(torch.cat([sparse(IDS[:1]).logits, sparse(IDS[1:]).logits]), whole, atol=1e-4)
    assert torch.equal(logits(model), dense)


def test_a_predictor_with_lookahead_is_trained_on_the_tokens_of_the_block_before(family_models):
    """Its data is what the two blocks' inputs and neurons, token by token, give by the same training."""
    model = family_models["opt"]
    layers = model.model.decoder.layers
    seen = watched(model, {0: layers[0].fc1, 1: layers[1].fc1, "neurons": layers[1].fc2})
    options = {"method": "dejavu", "sparsity": 0.5, "sites": None, "lookahead": True}
    with sparity.with_activations(model, IDS, **options):
        (hook,) = layers[1].fc1._forward_hooks.values()
        (own,) = layers[0].fc1._forward_hooks.values()
    labels = seen["neurons"].reshape(48, -1) > 0
    by_hand = trained(seen[0].reshape(48, -1), labels, 32, 8, 100, 0.01)
    assert torch.allclose(hook.predictor.first, by_hand.first, atol=1e-3)
    assert torch.allclose(hook.predictor.second, by_hand.second, atol=1e-3)
    assert hook.note is not None
    assert own.note is None


@pytest.fixture
def recipe(token_files, tiny_llama_folder):
    stage = {"method": {"dejavu": {"lookahead": True}}, "sparsity": 0.5, "sites": ["heads", "neurons"]}
    return sparity.Recipe.read(
        {
            "model": str(tiny_llama_folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 4},
            "stages": [{"activations": stage}],
            "measure": {"speed": None},
        }
    )


def test_a_run_that_was_killed_has_the_same_predictors_and_they_survive_saving(recipe, token_files, tmp_path):
    whole = sparity.run(recipe, output=tmp_path / "whole", device="cpu")
    expected = (whole.path / FILE).read_bytes()
    for count in (5, 8, 11, 14):
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            with pytest.raises(Killed):
                sparity.run(recipe, output=tmp_path / str(count), device="cpu")
        resumed = sparity.run(recipe, output=tmp_path / str(count), device="cpu", resume=True)
        assert (resumed.path / FILE).read_bytes() == expected
    stage, decoder = recipe.stages[0], Decoder.open(recipe.model)
    planned = stage.estimate(decoder, stage.decide(decoder, None), Workload(6, 24)).runtime_bytes
    assert planned == sum(tensor.nbytes for tensor in load_file(whole.path / FILE).values())
    model = whole.model()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(sparity.load(tmp_path / "saved")), logits(model))
    ids = torch.from_numpy(np.load(token_files["calibration"]))
    stage = {"sparsity": 0.5, "sites": ["heads", "neurons"], "lookahead": True}
    dense = sparity.load(recipe.model)
    with sparity.with_activations(dense, ids, method="dejavu", **stage) as sparse:
        assert torch.allclose(logits(sparse), logits(model), atol=1e-4)


def test_what_cannot_be_is_refused(family_models, recipe, tmp_path):
    model = family_models["llama"]
    for options, words in (
        ({"sites": ["heads", "down"]}, "heads and down are chosen in different ways"),
        ({"sites": "heads", "budget": "knapsack"}, "budget knapsack cannot measure block by block"),
        (
            {"sites": "neurons", "lookahead": True, "budget": "greedy"},
            r"sees .*gate_proj together with what",
        ),
        ({"sites": "heads", "labelled": 1.0}, r"labelled 1\.0 must lie between 0 and 1"),
    ):
        with (
            pytest.raises(InvalidInput, match=words),
            sparity.with_activations(model, IDS, method="dejavu", sparsity=0.5, **options),
        ):
            pass
    with (
        pytest.raises(InvalidInput, match=r"teal works at .*, not at heads"),
        sparity.with_activations(model, IDS, method="teal", sparsity=0.5, sites="heads"),
    ):
        pass
    place, method = heads_of(model)[0], registry.build("activations.method", "dejavu")
    data = {
        "first": drawn(8, 32),
        "second": drawn(4, 8),
        "kept": torch.tensor(2),
        "recall": torch.tensor(1.0),
        "ahead": torch.tensor(1, dtype=torch.uint8),
    }
    for change, words in (
        ({}, "reads what a block before it reads, and there is none"),
        ({"second": drawn(5, 8)}, r"second is float32 \[5, 8\], not float32 \[4, any\]"),
        ({"ahead": torch.tensor(1)}, "ahead is int64"),
    ):
        with pytest.raises(CorruptFile, match=words), method.attach(place, {**data, **change}, SparseTokens()):
            pass
    assert not place.module._forward_pre_hooks


def test_how_many_heads_are_found_is_told(family_models, caplog):
    with (
        caplog.at_level(logging.INFO, logger="sparity"),
        sparity.with_activations(family_models["llama"], IDS, method="dejavu", sparsity=0.75, sites="heads"),
    ):
        pass
    assert "of the heads with the largest outputs (so few can find 50.0 % at most)" in caplog.text
