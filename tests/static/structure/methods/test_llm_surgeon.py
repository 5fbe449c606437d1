"""LLM Surgeon against its formulas: the factors, the cost of columns, what makes up for them, and shots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_models import TOKENS, logits, model_for
from torch.nn.functional import cross_entropy

import sparity
from sparity.errors import InvalidInput
from sparity.models.cuts.whole import ragged_problem, stock_problem
from sparity.static.structure.competition import Part, cheapest
from sparity.static.structure.kronecker import Kronecker, curvature
from sparity.static.structure.methods.llm_surgeon import LLMSurgeon
from sparity.static.structure.subject import Subject

TINY = 1e-12


@pytest.fixture(scope="module")
def model():
    return model_for("llm_surgeon").requires_grad_(False)


def squares(*shape, seed):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


def test_two_columns_by_hand():
    factors = Kronecker(torch.tensor([[2.0, 1], [1, 2]]).double(), torch.tensor([[3.0]]).double())
    weight = torch.tensor([[1.0, 1]])
    # A^-1 = [[2, -1], [-1, 2]] / 3, so 3 * 1 / (2 * 2 / 3) = 9 / 4, and the other column takes half of the first
    torch.testing.assert_close(factors.costs(weight, 1, TINY), torch.tensor([2.25, 2.25]).double())
    left = factors.without(weight, torch.tensor([0]), TINY)
    torch.testing.assert_close(left, torch.tensor([[0, 1.5]]).double())
    assert left[0, 0] == 0
    # both columns as one unit: tr(G W A W^T) / 2 = 3 * 6 / 2
    torch.testing.assert_close(factors.costs(weight, 2, TINY), torch.tensor([9.0]).double())
    # damping of one half adds 1 to the diagonal: A^-1 = [[3, -1], [-1, 3]] / 8
    torch.testing.assert_close(factors.costs(weight, 1, 0.5), torch.tensor([4.0, 4.0]).double())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 4), st.integers(0, 1000))
def test_what_stays_is_where_the_loss_is_least_and_the_cost_is_that_loss(out, width, count, seed):
    size = width * count
    factors = Kronecker(squares(size + 3, size, seed=seed), squares(out + 3, out, seed=seed + 1))
    weight = torch.randn(out, size, generator=torch.Generator().manual_seed(seed)).double()
    costs = factors.costs(weight, width, TINY)
    for unit in range(count):
        columns = torch.arange(unit * width, (unit + 1) * width)
        rest = [column for column in range(size) if column not in columns]
        change = factors.without(weight, columns, TINY) - weight
        expected = torch.linalg.solve(factors.inputs[rest][:, rest], factors.inputs[rest][:, columns])
        torch.testing.assert_close(change[:, rest], weight[:, columns] @ expected.T, rtol=1e-5, atol=1e-7)
        loss = 0.5 * (factors.outputs @ change @ factors.inputs @ change.T).trace()
        torch.testing.assert_close(costs[unit], loss, rtol=1e-6, atol=1e-9)


def test_inputs_that_are_all_zero_cost_nothing():
    factors = Kronecker(torch.zeros(2, 2).double(), torch.zeros(3, 3).double())
    assert not factors.costs(torch.ones(3, 2), 1, 0.01).any()
    assert factors.without(torch.ones(3, 2), torch.tensor([1]), 0.01).tolist() == [[1, 0]] * 3


def test_the_factors_are_those_of_plain_backpropagation(model):
    found = curvature(Subject(model, TOKENS))
    name = "model.layers.1.mlp.down_proj"
    module, seen = model.get_submodule(name), []

    def see(module, given, output):
        output.requires_grad_().retain_grad()
        seen.append((given[0], output))

    hook = module.register_forward_hook(see)
    for ids in TOKENS:
        cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="sum").backward()
    hook.remove()
    x = torch.cat([given[0] for given, _ in seen]).double()
    slopes = torch.cat([output.grad[0] for _, output in seen]).double()
    key = next(key for key in found if key.startswith(name))
    torch.testing.assert_close(found[key].inputs, x.T @ x / TOKENS.numel(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[key].outputs, slopes.T @ slopes / TOKENS.numel(), rtol=1e-4, atol=1e-8)
    assert len(found) == 8  # o and down of four blocks


def test_one_shot_keeps_the_dearest_channels_and_the_model_is_the_updated_one_with_zeros(model):
    given = {"method": "llm_surgeon", "share": "block"}
    scores = sparity.structure_scores(model, TOKENS, **given)["mlp_channels"]
    kept = LLMSurgeon("block", 1).choose(Subject(model, TOKENS), 0.25)
    smaller = sparity.restructure(model, TOKENS, sparsity=0.25, shots=1, **given)
    factors = curvature(Subject(model, TOKENS))
    for index, layer in enumerate(smaller.model.layers):
        units = scores[index].topk(48).indices.sort().values
        assert kept["mlp_channels"][index] == units.tolist()
        gone = torch.tensor([unit for unit in range(64) if unit not in units])
        name = next(key for key in factors if key.startswith(f"model.layers.{index}.mlp.down_proj"))
        dense = model.model.layers[index].mlp
        expected = factors[name].without(dense.down_proj.weight, gone, 0.01)[:, units]
        torch.testing.assert_close(layer.mlp.down_proj.weight.double(), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.mlp.up_proj.weight, dense.up_proj.weight[units])


def test_later_shots_see_the_model_of_earlier_ones(model):
    two = sparity.restructure(model, TOKENS, method="llm_surgeon", share="block", sparsity=0.5, shots=2)
    first = sparity.restructure(model, TOKENS, method="llm_surgeon", share="block", sparsity=0.25, shots=1)
    # of 64 channels 16 went, and 16 of 48 follow: int(48 * 0.34) is 16; of two heads one goes only in the second
    second = sparity.restructure(first, TOKENS, method="llm_surgeon", share="block", sparsity=0.34, shots=1)
    assert (two.config.intermediate_size, two.config.num_key_value_heads) == (32, 1)
    assert torch.equal(two.model.layers[0].mlp.up_proj.weight, second.model.layers[0].mlp.up_proj.weight)


def test_the_cheapest_weights_go_and_one_unit_of_each_kind_stays():
    parts = {
        "a": [Part(None, torch.tensor([1.0, 5, 9]), 1), Part(None, torch.tensor([0.5, 0.1, 0.2]), 1)],
        "b": [Part(None, torch.tensor([4.0, 40]), 4), Part(None, torch.tensor([80.0, 2]), 4)],
    }
    dense = {"a": [3, 3], "b": [2, 2]}  # 22 weights
    # by cost a weight: 0.1, 0.2, (0.5: the last of its block), 0.5 of the second b (4 weights), 1 of the first a and b
    found = cheapest(parts, dense, 6 / 22)
    assert [rows.tolist() for rows in found["a"]] == [[0, 1, 2], [0]]
    assert [rows.tolist() for rows in found["b"]] == [[0, 1], [0]]
    found = cheapest(parts, dense, 5.9 / 22)
    assert [rows.tolist() for rows in found["b"]] == [[0, 1], [0, 1]]
    found = cheapest(parts, {"a": [3, 5], "b": [2, 2]}, 0.25)  # of 24 weights 2 are gone already, so 4 may go
    assert [rows.tolist() for rows in found["a"]] == [[0, 1, 2], [0]]


def test_all_blocks_compete_for_one_share_of_the_weights(model):
    smaller = sparity.restructure(model, TOKENS, method="llm_surgeon", sparsity=0.3, shots=3)

    def weights(model):
        return sum(p.numel() for name, p in model.named_parameters() if "proj" in name)

    share = 1 - weights(smaller) / weights(model)
    assert 0.25 < share <= 0.3
    assert ragged_problem(smaller) is None
    assert stock_problem(smaller) is not None
    assert torch.isfinite(logits(smaller)).all()


def test_what_it_cannot_do_is_refused(model):
    for wrong in ({"shots": 0}, {"damping": 0.0}):
        with pytest.raises(InvalidInput, match="`shots` must be 1 or more and `damping` above 0"):
            sparity.structure_scores(model, TOKENS, method="llm_surgeon", **wrong)
    with pytest.raises(InvalidInput, match="llm_surgeon has no rule for experts"):
        sparity.restructure(model_for("reap"), TOKENS, method="llm_surgeon", sparsity=0.5)
    with pytest.raises(InvalidInput, match="at least 3 tokens"):
        sparity.structure_scores(model, TOKENS[:, :2], method="llm_surgeon")
