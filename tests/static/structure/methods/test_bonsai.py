"""Bonsai against its formula: what a regression finds, what sub-models miss, and what goes in a round."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_models import TOKENS, logits, model_for
from torch.nn.functional import cross_entropy

import sparity
from sparity.errors import InvalidInput
from sparity.static.structure.subject import Subject
from sparity.static.structure.submodels import RIDGES, priors, regression, submodels


@pytest.fixture(scope="module")
def model():
    return model_for("bonsai").requires_grad_(False)


def loss_of(model):
    return sum(float(cross_entropy(logits(model, ids[None])[0, :-1], ids[1:])) for ids in TOKENS) / len(TOKENS)


def without(model, gone):
    """The model with channels of blocks set to zero: block -> channels."""
    model = copy.deepcopy(model)
    for index, channels in gone.items():
        model.model.layers[index].mlp.down_proj.weight[:, channels] = 0
    return model


def test_a_sub_model_has_the_loss_of_the_model_with_its_units_at_zero(model):
    with submodels(Subject(model, TOKENS), "mlp_channels") as (models, _):
        assert models.loss() == pytest.approx(loss_of(model), rel=1e-5)
        models.masks[1][[3, 5]] = 0
        models.masks[3][:40] = 0
        assert models.loss() == pytest.approx(loss_of(without(model, {1: [3, 5], 3: list(range(40))})), rel=1e-5)
    with submodels(Subject(model, TOKENS), "kv_groups") as (models, _):
        models.masks[2][1] = 0
        dense = copy.deepcopy(model)
        dense.model.layers[2].self_attn.o_proj.weight[:, 16:] = 0  # query heads 2 and 3 share the second key
        assert models.loss() == pytest.approx(loss_of(dense), rel=1e-5)


def test_the_prior_is_what_a_unit_adds_at_most(model):
    seen = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    for ids in TOKENS:
        logits(model, ids[None])
    hook.remove()
    expected = torch.cat(seen).norm(dim=0) * model.model.layers[1].mlp.down_proj.weight.abs().sum(0)
    with submodels(Subject(model, TOKENS), "mlp_channels") as (models, outputs):
        torch.testing.assert_close(priors(models, outputs)[1], expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 12), st.integers(2, 15), st.integers(0, 1000))
def test_the_ridge_is_the_one_that_predicts_each_model_from_the_others_best(count, units, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(count, units, generator=generator) < 0.5).double()
    values = torch.rand(count, generator=generator, dtype=torch.float64)
    x, y = kept - kept.mean(0), values - values.mean()
    scale = torch.linalg.eigvalsh(x @ x.T).clamp_min(0).mean()
    if not scale:
        assert not regression(kept, values).any()
        return

    def fitted(x, y, ridge):
        return torch.linalg.solve(x.T @ x + ridge * scale * torch.eye(units, dtype=torch.float64), x.T @ y)

    errors = []
    for ridge in RIDGES:
        rest = [[other for other in range(count) if other != one] for one in range(count)]
        errors.append(sum(float(y[i] - x[i] @ fitted(x[r], y[r], ridge)) ** 2 for i, r in enumerate(rest)))
    found = regression(kept, values)
    near = [ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= min(errors) * (1 + 1e-6)]
    assert any(torch.allclose(found, fitted(x, y, ridge), rtol=1e-6, atol=1e-9) for ridge in near)


def test_a_loss_that_is_linear_is_found_exactly():
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    kept = torch.tensor([[int(bit) for bit in f"{number:04b}"] for number in range(16)]).double()
    torch.testing.assert_close(regression(kept, kept @ weights + 3), weights, rtol=1e-3, atol=1e-3)


def test_what_goes_first_is_what_is_missed_least(model):
    harmless = copy.deepcopy(model)
    channels = torch.arange(0, 64, 4)  # 16 of 64 of every block give next to nothing
    for layer in harmless.model.layers:
        layer.mlp.down_proj.weight.data[:, channels] *= 1e-4
    given = {"method": "bonsai", "masks": 40, "step": 0.25}
    smaller = sparity.restructure(harmless, TOKENS, sparsity=0.125, **given)
    assert smaller.config.intermediate_size == 56
    for layer, dense in zip(smaller.model.layers, harmless.model.layers, strict=True):
        columns = {tuple(column.tolist()) for column in layer.mlp.down_proj.weight.T}
        gone = [j for j in range(64) if tuple(dense.mlp.down_proj.weight[:, j].tolist()) not in columns]
        assert len(gone) == 8
        assert set(gone) <= set(channels.tolist())  # the candidates of the one round are the 16


def test_rounds_end_at_the_size_that_was_planned_and_another_seed_may_choose_others(model):
    given = {"method": "bonsai", "masks": 6}
    for sparsity, left in ((0.3, 45), (0.9, 7)):
        found = sparity.restructure(model, TOKENS, sparsity=sparsity, step=0.4, **given)
        assert found.config.intermediate_size == left
    heads = sparity.restructure(model, TOKENS, sparsity=0.5, dimension="kv_groups", **given)
    assert (heads.config.num_attention_heads, heads.config.num_key_value_heads) == (2, 1)
    first, second = (sparity.restructure(model, TOKENS, sparsity=0.5, step=0.25, seed=seed, **given) for seed in (0, 1))
    assert not torch.equal(logits(first), logits(second))


def test_what_it_cannot_cut_is_refused(model):
    for wrong, words in (
        ({"dimension": "query_heads"}, 'bonsai cuts mlp_channels or kv_groups of this model, not "query_heads"'),
        ({"masks": 1}, "`masks` must be 2 or more"),
        ({"step": 1.0}, r"`step` in \(0, 1\)"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.restructure(model, TOKENS, method="bonsai", sparsity=0.5, **wrong)
    with pytest.raises(InvalidInput, match="bonsai has no rule for experts"):
        sparity.restructure(model_for("reap"), TOKENS, method="bonsai", sparsity=0.5)
