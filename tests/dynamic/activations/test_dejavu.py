"""DejaVu's predictor: what it learns, what it names, and that neurons it does not name are 0."""

import copy
import logging
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

import sparity
from families import build, tiny_configs
from sparity import registry
from sparity.dynamic.activations.fitting import seen_at
from sparity.dynamic.activations.neuron_predictor import Predictor, active, top, trained
from sparity.dynamic.activations.places import places_of
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites

IDS = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def neurons_of(model):
    return places_of(model, input_sites(model), "neurons")


def test_what_is_named_and_what_is_active_by_hand():
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0], [math.nan, 0.0, -1.0, 5.0]])
    assert top(logits, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert top(logits, 2).tolist() == [[False, True, True, False], [True, False, False, True]]
    labels, of_relu = active(torch.tensor([[0.0, 2.0, 1.0]]), 1)
    assert (labels.tolist(), of_relu) == ([[False, True, True]], True)
    labels, of_relu = active(torch.tensor([[0.5, 2.0, -3.0]]), 1)
    assert (labels.tolist(), of_relu) == ([[False, False, True]], False)


def test_training_steps_are_the_published_ones():
    x, labels = drawn(40, 6), drawn(40, 10, seed=1) > 0.5
    held = torch.arange(40) % 20 == 0
    generator = torch.Generator().manual_seed(0)
    first = torch.nn.Linear(6, 3, bias=False)
    second = torch.nn.Linear(3, 10, bias=False)
    with torch.no_grad():
        first.weight.copy_((torch.rand(3, 6, generator=generator) * 2 - 1) / 6**0.5)
        second.weight.copy_((torch.rand(10, 3, generator=generator) * 2 - 1) / 3**0.5)
    optimiser = torch.optim.AdamW([first.weight, second.weight], 0.01, weight_decay=0.01)
    inputs, wanted = (x / x.square().mean().sqrt())[~held], labels[~held].float()
    recalls = []
    for step in range(11):
        with torch.no_grad():
            if step in (0, 10):
                named = second(first((x / x.square().mean().sqrt())[held])).topk(5).indices
                found = torch.zeros(2, 10, dtype=torch.bool).scatter(1, named, True)
                recalls.append((float((found & labels[held]).sum() / labels[held].sum()), first.weight.clone()))
        share = wanted.mean() + 0.005
        loss = binary_cross_entropy(second(first(inputs)).sigmoid(), wanted, weight=wanted * (1 - share) + share)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    recall, weight = max(recalls, key=lambda pair: pair[0])  # the first of equal ones
    result = trained(x, labels, kept=5, rank=3, steps=10, rate=0.01)
    assert result.recall == pytest.approx(recall)
    assert torch.allclose(result.first, weight, atol=1e-4)


def test_a_predictor_of_low_rank_learns_neurons_of_low_rank():
    x, mixing = drawn(1000, 32), drawn(4, 32, seed=1)
    neurons = (x @ mixing.T @ drawn(96, 4, seed=2).T - 1).relu()
    found = [trained(x, neurons > 0, kept=64, rank=rank, steps=100, rate=0.01) for rank in (4, 4, 1)]
    assert found[0].recall > 0.98
    assert found[2].recall < found[0].recall
    assert torch.equal(found[0].first, found[1].first)  # the same bits each time
    assert torch.equal(found[0].second, found[1].second)
    with torch.inference_mode():
        again = trained(x, neurons > 0, kept=64, rank=4, steps=100, rate=0.01)
    assert torch.equal(again.second, found[0].second)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt2"])
def test_what_a_place_says_of_the_neurons_is_what_the_last_projection_reads(family, family_models):
    model = copy.deepcopy(family_models[family])
    decoder = Decoder.open(model)
    places = places_of(decoder.skeleton, decoder.sites(0), "neurons")
    assert [place.kind for place in places] == ["neurons"]
    assert [p.role for p in places[0].saves] == (
        ["fc1", "fc2"] if family in ("opt", "gpt2") else ["gate", "up", "down"]
    )
    place = neurons_of(model)[0]
    seen = {}
    handles = [
        place.reads[0].module.register_forward_pre_hook(lambda _, given: seen.update(reads=given[0])),
        place.saves[-1].module.register_forward_pre_hook(lambda _, given: seen.update(neurons=given[0])),
    ]
    with torch.no_grad():
        model(IDS)
        for handle in handles:
            handle.remove()
        statistics = sparity.calibration.Statistics.gather("site", {"inputs"})
        statistics.add(seen["reads"].reshape(48, -1))
        method = registry.build("activations.method", "dejavu")
        found = seen_at(method, place, statistics)
    order, wanted = found.neurons.sum(1).argsort(), seen["neurons"].reshape(48, -1)
    assert found.neurons.shape == (48, place.columns)
    assert torch.allclose(found.neurons[order], wanted[wanted.sum(1).argsort()], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt2"])
def test_neurons_that_are_not_named_are_0(family, family_models):
    model = family_models[family]
    place, seen = neurons_of(model)[1], {}
    with (
        torch.no_grad(),
        sparity.with_activations(model, IDS, method="dejavu", sparsity=0.75, sites=None, first=2) as sparse,
    ):
        hook = next(iter(place.reads[0].module._forward_hooks.values()))
        handles = [
            place.reads[0].module.register_forward_pre_hook(lambda _, given: seen.update(reads=given[0])),
            place.saves[-1].module.register_forward_pre_hook(lambda _, given: seen.update(neurons=given[0])),
        ]
        found = sparse(IDS).logits
        assert torch.equal(copy.deepcopy(sparse)(IDS).logits, found)
        for handle in handles:
            handle.remove()
    named = hook.predictor.keep(seen["reads"].reshape(2, 24, -1))
    neurons = seen["neurons"].reshape(2, 24, -1)
    assert bool((neurons[:, 2:][~named[:, 2:]] == 0).all())
    assert bool((neurons[:, :2][~named[:, :2]] != 0).any())  # the first tokens are dense
    assert bool((neurons[:, 2:][named[:, 2:]] != 0).any())
    assert (named.sum(-1) == place.columns // 4).all()


def test_a_predictor_that_names_all_gives_the_dense_bits(family_models):
    model = family_models["opt"]
    with torch.no_grad():
        dense = model(IDS).logits
        place = neurons_of(model)[0]
        method = registry.build("activations.method", "dejavu")
        width = place.reads[0].module.in_features
        data = {
            "first": drawn(3, width),
            "second": drawn(place.columns, 3),
            "kept": torch.tensor(place.columns),
            "recall": torch.tensor(1.0),
        }
        with method.attach(place, data, SparseTokens(first=0)):
            assert torch.equal(model(IDS).logits, dense)
        with method.attach(place, {**data, "kept": torch.tensor(1)}, SparseTokens(first=0)):
            assert not torch.equal(model(IDS).logits, dense)
        assert torch.equal(model(IDS).logits, dense)


def test_recall_is_told_and_of_other_functions_than_relu_as_a_warning(caplog):
    model = build(tiny_configs()["opt"])
    with caplog.at_level(logging.INFO, logger="sparity"):
        with sparity.with_activations(model, IDS, method="dejavu", sparsity=0.5, sites=None):
            pass
        assert {record.levelname for record in caplog.records} == {"INFO"}
        assert "of the active neurons" in caplog.text
        caplog.clear()
        with sparity.with_activations(build(tiny_configs()["llama"]), IDS, method="dejavu", sparsity=0.5, sites=None):
            pass
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert "no neuron of this MLP is exactly 0" in caplog.text


def test_what_does_not_fit_is_refused(family_models):
    for options in ({"rank": 0}, {"steps": 0}, {"rate": 0.0}):
        with pytest.raises(InvalidInput, match="must be positive"):
            registry.build("activations.method", {"dejavu": options})
    with (
        pytest.raises(InvalidInput, match="dejavu works at neurons or heads, not at hidden"),
        sparity.with_activations(family_models["llama"], IDS, method="dejavu", sparsity=0.5, sites="hidden"),
    ):
        pass
    found = sparity.fit_activations(drawn(40, 16), method="dejavu", sparsity=0.5)
    for change, words in (
        ({"first": torch.ones(4, 9)}, r"first is float32 \[4, 9\], not float32 \[any, 16\]"),
        ({"first": torch.ones(3, 16)}, "matrices of ranks 3 and 8"),
        ({"second": torch.full((16, 8), math.nan)}, "second is not finite"),
        ({"kept": torch.tensor(17)}, "kept is 17, not 1 to 16"),
    ):
        with pytest.raises(CorruptFile, match=words):
            found.method.mask({**found.tensors, **change}, drawn(1, 4, 16))


def test_nan_names_every_neuron_of_its_token():
    predictor = Predictor(drawn(2, 4), drawn(6, 2), 3)
    x = drawn(3, 4)
    x[1, 2] = math.nan
    assert predictor.keep(x).sum(1).tolist() == [3, 6, 3]
