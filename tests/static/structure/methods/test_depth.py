"""Methods for the depth against their published formulas, written plainly over a model's hidden states."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from structure_models import TOKENS, logits, model_for

import sparity
from sparity.errors import InvalidInput


@pytest.fixture(scope="module")
def model():
    return model_for("shortgpt").requires_grad_(False)


@pytest.fixture(scope="module")
def states(model):
    """The hidden states before each block and behind the last, without the last norm: `[samples, tokens, hidden]`."""
    found = []
    hooks = [layer.register_forward_pre_hook(lambda m, given: found.append(given[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, given: found.append(given[0])))
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


def cosine(a, b):
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


def loss(model, blocks):
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList(smaller.model.layers[i] for i in blocks)
    for number, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = number
    smaller.config.num_hidden_layers = len(blocks)
    return sum(float(smaller(s[None], labels=s[None], use_cache=False).loss) for s in TOKENS) / len(TOKENS)


def weights_of(smaller, model):
    """Which blocks of the dense model are left, by their weights."""
    found = []
    for layer in smaller.model.layers:
        same = [torch.equal(layer.mlp.up_proj.weight, other.mlp.up_proj.weight) for other in model.model.layers]
        found.append(same.index(True) if any(same) else None)
    return found


def test_shortgpt_is_one_minus_the_mean_cosine(model, states):
    found = sparity.structure_scores(model, TOKENS, method="shortgpt")["depth"]
    expected = torch.stack([1 - cosine(a, b).mean() for a, b in pairwise(states)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    smaller = sparity.restructure(model, TOKENS, method="shortgpt", sparsity=0.5)
    assert weights_of(smaller, model) == expected.topk(2).indices.sort().values.tolist()


def test_shortgpt_counts_a_silent_token_as_the_code_does(model):
    silent = copy.deepcopy(model)
    silent.model.embed_tokens.weight[5] = 0
    tokens = torch.full((1, 1), 5)
    paper = sparity.structure_scores(silent, tokens, method="shortgpt")["depth"]
    code = sparity.structure_scores(silent, tokens, method="shortgpt", reference=True)["depth"]
    assert paper.tolist() == [1.0] * 4  # nothing in, nothing out
    assert code.tolist() == [0.5] * 4


def test_angular_distance_of_the_last_token(model, states):
    for run in (1, 2, 3):
        found = sparity.structure_scores(model, TOKENS, method="angular", run=run)["depth"]
        expected = [
            float((cosine(states[i][:, -1], states[i + run][:, -1]).arccos() / math.pi).mean()) for i in range(5 - run)
        ]
        assert found[: 5 - run].tolist() == pytest.approx(expected, rel=1e-4)
        assert found[5 - run :].isinf().all()
    first = expected.index(min(expected))  # of three
    smaller = sparity.restructure(model, TOKENS, method="angular", sparsity=0.75)
    assert weights_of(smaller, model) == [index for index in range(4) if not first <= index < first + 3]


def test_sleb_removes_greedily_by_the_loss(model):
    left = [0, 1, 2, 3]
    found = sparity.structure_scores(model, TOKENS, method="sleb")["depth"]
    assert found[0] == found[3] == math.inf
    for _ in range(2):
        losses = {gone: loss(model, [index for index in left if index != gone]) for gone in left[1:-1]}
        if len(left) == 4:
            assert found[1:3].tolist() == pytest.approx([losses[1], losses[2]], rel=1e-4)
        left.remove(min(losses, key=losses.get))
    assert weights_of(sparity.restructure(model, TOKENS, method="sleb", sparsity=0.5), model) == left
    with pytest.raises(InvalidInput, match=r"sleb may remove 2 of the 4 blocks, but a sparsity of 0.7 means 3"):
        sparity.restructure(model, TOKENS, method="sleb", sparsity=0.7)


def last_states(model):
    with torch.no_grad():
        return model.model(TOKENS, use_cache=False).last_hidden_state.flatten(1)


def merged(model, first, count, reference=False):
    """Blocks `first` to `first + count - 1` as one, by the paper's sum or the notebook's loop."""
    smaller = copy.deepcopy(model)
    base, layers = smaller.model.layers[first], model.model.layers
    for name, parameter in base.named_parameters():
        if parameter.ndim == 1:
            continue  # norms stay the first's
        own = parameter.clone()
        for k in range(1, count):
            other = layers[first + k].get_parameter(name)
            parameter.add_(other - (parameter if reference else own))
    return sparity.cut(smaller, {"depth": [i for i in range(len(layers)) if not first < i < first + count]})


@pytest.mark.parametrize("reference", [False, True])
def test_laco_merges_from_the_top(model, reference):
    options = {"merge": 2, "interval": 1, "threshold": -1.0, "reference": reference}
    found = sparity.structure_scores(model, TOKENS, method="laco", **options)["depth"]
    for index in range(3):
        one = merged(model, index, 2, reference)
        expected = 1 - float(cosine(last_states(one), last_states(model)).mean())
        assert float(found[index]) == pytest.approx(expected, abs=1e-5)
    once = sparity.restructure(model, TOKENS, method="laco", sparsity=0.25, **options)
    torch.testing.assert_close(logits(once), logits(merged(model, 1, 2, reference)), rtol=1e-4, atol=1e-4)
    assert torch.equal(once.model.layers[1].input_layernorm.weight, model.model.layers[1].input_layernorm.weight)
    if reference:  # the loop ends at the last block's weights
        assert torch.allclose(once.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    twice = sparity.restructure(model, TOKENS, method="laco", sparsity=0.5, **options)
    assert twice.config.num_hidden_layers == 2
    with pytest.raises(
        InvalidInput, match=r"1 of the blocks that should go turn the output too far .*: lower `threshold`"
    ):
        sparity.restructure(model, TOKENS, method="laco", sparsity=0.25, merge=2, threshold=1.0)


def test_linear_map_is_the_least_squares_fit(model, states):
    found = sparity.structure_scores(model, TOKENS, method="linear_map", into="stream", run=2)["depth"]
    expected = [float(1 - cosine(states[i], states[i + 2]).mean()) for i in range(3)]
    assert found[:3].tolist() == pytest.approx(expected, rel=1e-4)
    first = expected.index(min(expected))
    x = states[first].flatten(0, 1).double()
    y = states[first + 2].flatten(0, 1).double()
    ridge = 1e-4 * (x.T @ x).diagonal().mean() * torch.eye(32).double()
    solved = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - x)).float()
    smaller = sparity.restructure(model, TOKENS, method="linear_map", into="stream", sparsity=0.5)
    mapped = [layer for layer in smaller.model.layers if hasattr(layer, "added")]
    assert len(mapped) == 1
    torch.testing.assert_close(mapped[0].added, solved, rtol=1e-3, atol=1e-4)
    generated = smaller.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 20)


def test_a_map_in_the_mlp_before_the_cut_brings_the_stream_nearer(model, states):
    turns = [float(1 - cosine(states[i], states[i + 1]).mean()) for i in range(1, 4)]
    first = 1 + turns.index(min(turns))
    mapped = sparity.restructure(model, TOKENS, method="linear_map", sparsity=0.25)
    plain = sparity.cut(model, {"depth": [index for index in range(4) if index != first]})
    given = []
    hook = model.model.layers[first - 1].mlp.register_forward_hook(lambda m, x, output: given.append(output))
    logits(model)
    hook.remove()
    m = given[0].flatten(0, 1).double()
    rest = states[first].flatten(0, 1).double() - m
    ridge = 1e-4 * (m.T @ m).diagonal().mean() * torch.eye(32).double()
    t = torch.linalg.solve(m.T @ m + ridge, m.T @ (states[first + 1].flatten(0, 1).double() - rest))
    down = model.model.layers[first - 1].mlp.down_proj.weight
    torch.testing.assert_close(
        mapped.model.layers[first - 1].mlp.down_proj.weight, (t.T @ down.double()).float(), rtol=1e-3, atol=1e-4
    )

    def distance(smaller):
        return float((last_states(smaller) - last_states(model)).norm())

    assert distance(mapped) < distance(plain)


def test_a_map_needs_an_mlp_whose_output_is_added_as_it_is():
    from families import build, tiny_configs

    with pytest.raises(InvalidInput, match=r"does not add what its MLP gives .*: set `into: stream`"):
        sparity.restructure(build(tiny_configs()["gemma2"]), TOKENS, method="linear_map", sparsity=0.34)
