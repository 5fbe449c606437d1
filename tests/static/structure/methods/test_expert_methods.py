"""Methods for experts against their published formulas, written plainly expert by expert and token by token."""

import copy
from itertools import combinations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from structure_models import TOKENS, logits, model_for
from torch.nn.functional import cosine_similarity, normalize, silu

import sparity
from sparity.errors import InvalidInput
from sparity.static.structure.merging import grouped


@pytest.fixture(scope="module")
def model():
    return model_for("reap").requires_grad_(False)


def given_to(model, index):
    """What a block's mixture is given, `[samples, tokens, hidden]`."""
    found = []
    hook = model.model.layers[index].mlp.register_forward_pre_hook(lambda m, x: found.append(x[0]))
    logits(model)
    hook.remove()
    return found[0]


def expert(model, index, number, x):
    experts = model.model.layers[index].mlp.experts
    gate, up = (x @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
    neurons = silu(gate) * up
    return neurons @ experts.down_proj[number].T, neurons


def routes(model, index, x):
    """Of each token the softmax over all experts, the two chosen, and their weights."""
    soft = (x @ model.model.layers[index].mlp.gate.weight.T).softmax(-1)
    weights, chosen = soft.topk(2, dim=-1)
    return soft, chosen, weights / weights.sum(-1, keepdim=True)


def plain_saliency(model, index, x, reference=False):
    soft, chosen, weights = routes(model, index, x)
    found = []
    for number in range(4):
        parts = []
        for token, (experts, shares) in enumerate(zip(chosen, weights, strict=True)):
            for place in range(2):
                if experts[place] == number:
                    share = soft[token, number] if reference else shares[place]
                    parts.append(share * expert(model, index, number, x[token])[0].norm())
        found.append(torch.stack(parts).mean() if parts else torch.tensor(0.0))
    return torch.stack(found)


def test_frequency_and_reap(model):
    counts = sparity.structure_scores(model, TOKENS, method="frequency")["experts"]
    found = sparity.structure_scores(model, TOKENS, method="reap")["experts"]
    theirs = sparity.structure_scores(model, TOKENS, method="reap", reference=True)["experts"]
    for index in range(4):
        x = given_to(model, index).flatten(0, 1)
        _, chosen, _ = routes(model, index, x)
        assert counts[index].tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()
        torch.testing.assert_close(found[index], plain_saliency(model, index, x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(theirs[index], plain_saliency(model, index, x, True), rtol=1e-4, atol=1e-6)


def test_naee_tries_every_set(model):
    smaller = sparity.restructure(model, TOKENS, method="naee", sparsity=0.25)
    found = sparity.structure_scores(model, TOKENS, method="naee")["experts"]
    for index in range(4):
        given = given_to(model, index)
        errors = {}
        for kept in combinations(range(4), 3):
            error = 0.0
            for x in given:
                scores = x @ model.model.layers[index].mlp.gate.weight.T
                outputs = torch.stack([expert(model, index, number, x)[0] for number in range(4)])

                def mixed(scores, outputs=outputs):
                    weights, chosen = scores.softmax(-1).topk(2, dim=-1)
                    weights = weights / weights.sum(-1, keepdim=True)
                    return sum(weights[:, k, None] * outputs[chosen[:, k], torch.arange(len(chosen))] for k in range(2))

                restricted = scores.clone()
                restricted[:, [number for number in range(4) if number not in kept]] = -torch.inf
                error += float((mixed(scores) - mixed(restricted)).norm())
            errors[kept] = error
        best = min(errors, key=errors.get)
        router = smaller.model.layers[index].mlp.gate.weight
        assert torch.equal(router, model.model.layers[index].mlp.gate.weight[list(best)])
        alone = [errors[tuple(sorted(set(range(4)) - {number}))] for number in range(4)]
        assert found[index].tolist() == pytest.approx(alone, rel=1e-3)
    with pytest.raises(InvalidInput, match=r"would try 4 sets of 3 of 4 experts, more than `sets`, 3: raise it"):
        sparity.restructure(model, TOKENS, method="naee", sparsity=0.25, sets=3)


def test_ream_merges_as_its_formula_says(model):
    smaller = sparity.restructure(model, TOKENS, method="ream", sparsity=0.5)
    x = given_to(model, 0).flatten(0, 1)  # later blocks see merged ones
    saliency = plain_saliency(model, 0, x)
    soft, _, _ = routes(model, 0, x)
    outputs = torch.stack([(soft[:, e, None] * expert(model, 0, e, x)[0]).mean(0) for e in range(4)])
    gates = normalize((x @ model.model.layers[0].mlp.gate.weight.T).T, dim=-1)
    distance = torch.cdist(gates, gates)
    similarity = (
        (cosine_similarity(outputs[:, None], outputs[None], dim=-1) + 1) / 2 + 1 - distance / distance.max()
    ) / 2
    first, second = saliency.topk(2).indices.tolist()
    others = sorted(set(range(4)) - {first, second}, key=lambda e: -float(similarity[first, e]))
    members = [first, *others]  # both fit into the first group
    experts = model.model.layers[0].mlp.experts
    matrices = [(*experts.gate_up_proj[e].chunk(2), experts.down_proj[e]) for e in range(4)]
    weight = saliency[members] / saliency[members].sum()
    mean = [weight[0] * part for part in matrices[first]]
    neurons = [normalize(expert(model, 0, e, x)[1].T, dim=-1) for e in range(4)]
    vectors = [normalize(torch.cat([g, u, d.T], 1), dim=-1) for g, u, d in matrices]
    for share, e in zip(weight[1:], others, strict=True):
        cost = torch.cdist(neurons[first], neurons[e]) + torch.cdist(vectors[first], vectors[e])
        order = torch.as_tensor(linear_sum_assignment(cost.numpy())[1])
        gate, up, down = matrices[e]
        mean = [a + share * b for a, b in zip(mean, (gate[order], up[order], down[:, order]), strict=True)]
    kept = sorted([first, second])
    found = smaller.model.layers[0].mlp
    assert torch.equal(found.gate.weight, model.model.layers[0].mlp.gate.weight[kept])
    place = kept.index(first)
    torch.testing.assert_close(found.experts.gate_up_proj[place], torch.cat(mean[:2]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.experts.down_proj[place], mean[2], rtol=1e-3, atol=1e-4)
    assert torch.equal(found.experts.down_proj[1 - place], experts.down_proj[second])


def test_merging_copies_of_an_expert_with_its_neurons_in_another_order_changes_nothing(model):
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        experts = layer.mlp.experts
        order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
        for other in (1, 2, 3):
            gate, up = experts.gate_up_proj[0].chunk(2)
            experts.gate_up_proj[other] = torch.cat([gate[order], up[order]])
            experts.down_proj[other] = experts.down_proj[0][:, order]
    smaller = sparity.restructure(twin, TOKENS, method="ream", sparsity=0.5)
    torch.testing.assert_close(logits(smaller), logits(twin), rtol=1e-4, atol=1e-4)


def test_groups_fill_from_the_most_salient():
    saliency = torch.tensor([1.0, 5.0, 0.1, 4.0, 0.2, 0.3])
    similarity = torch.tensor([[0.0] * 6] * 6)
    similarity[1] = torch.tensor([0.1, 1.0, 0.9, 0.0, 0.8, 0.7])
    assert grouped(saliency, similarity, [1, 3], 3) == {1: [1, 2, 4], 3: [3, 0, 5]}
    assert grouped(saliency, similarity, [1, 3], 16) == {1: [1, 2, 4, 5, 0], 3: [3]}
    model = model_for("ream")
    with pytest.raises(InvalidInput, match="every token visits 2"):
        sparity.restructure(model, TOKENS, method="ream", sparsity=0.75, group=2)
