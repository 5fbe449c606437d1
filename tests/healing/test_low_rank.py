"""Low ranks beside matrices, EoRA's and SLiM's: the best of their rank, by hand and against NumPy."""

import copy

import pytest
import torch
from healing_tasks import IDS, drawn, run_method, sparse_of, task_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity import registry
from sparity.errors import InvalidInput
from sparity.healing.heal.low_rank import eigenspace_low_rank, salient_low_rank
from sparity.healing.heal.side_by_side import pairs
from sparity.healing.heal.sums import Sums
from sparity.models.attached_runtime import input_sites


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_low_rank_is_the_best_of_its_rank_on_the_inputs(rows, columns, rank, seed):
    error, x = drawn(rows, columns, seed=seed).double(), drawn(50, columns, seed=seed + 1).double()
    gram = x.T @ x
    first, second = eigenspace_low_rank(error, gram, rank)
    assert first.shape == (min(rank, rows, columns), columns)
    assert second.shape == (rows, min(rank, rows, columns))
    left = float(((error - second @ first) @ x.T).square().sum())
    whitened = torch.linalg.svdvals(error @ torch.linalg.cholesky(gram))  # another square root of the same matrix
    assert left == pytest.approx(float(whitened[rank:].square().sum()), rel=1e-6, abs=1e-8)


def test_a_low_rank_ignores_directions_that_no_input_has():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    first, second = eigenspace_low_rank(torch.tensor([[0.5, 100.0]]), x.T @ x, 1)
    assert float((second @ first)[0, 0]) == pytest.approx(0.5, rel=1e-3)
    assert bool(first.isfinite().all() and second.isfinite().all())


# ---- SLiM


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_slims_low_rank_is_the_best_of_its_rank_where_columns_count_by_their_inputs(rows, columns, rank, seed):
    error, squares = drawn(rows, columns, seed=seed).double(), drawn(columns, seed=seed + 1).double().square() + 0.1
    first, second = salient_low_rank(error, squares, rank)
    assert first.shape == (min(rank, rows, columns), columns)
    assert second.shape == (rows, min(rank, rows, columns))
    left = float(((error - second @ first).square() * squares).sum())
    sizes = torch.linalg.svdvals(error @ torch.diag(squares.sqrt()))
    assert left == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-6, abs=1e-8)
    same = eigenspace_low_rank(error, torch.diag(squares), rank)  # EoRA of inputs that have nothing to do with another
    assert torch.allclose(second @ first, same[1] @ same[0], atol=1e-9)
    if rank < min(rows, columns):
        plain = eigenspace_low_rank(error, torch.eye(columns, dtype=torch.float64), rank)
        assert left <= float(((error - plain[1] @ plain[0]).square() * squares).sum()) + 1e-9


def test_slims_low_rank_by_hand_and_with_an_input_that_is_never_there():
    error = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    first, second = salient_low_rank(error, torch.tensor([1.0, 4.0]), 1)  # weighed, the columns have norms of 3 and 4
    assert torch.allclose(second @ first, torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64), atol=1e-6)
    first, second = salient_low_rank(torch.tensor([[0.5, 100.0]]), torch.tensor([5.0, 0.0]), 1)
    assert bool(first.isfinite().all() and second.isfinite().all())
    assert torch.allclose(second @ first, torch.tensor([[0.5, 100.0]], dtype=torch.float64))


def test_slim_sums_the_squares_that_a_site_reads_and_takes_a_share_for_rank(tmp_path):
    dense = tiny()
    model, masks = sparse_of(dense)
    task, built = task_of(dense, model, masks, tmp_path), registry.build("heal.method", {"slim": {"rank": 0.25}})
    pair = next(pairs(task))
    site, seen, sums = pair.block.sites[0], [], Sums()
    with site.watch(seen.append):
        for sample in range(len(IDS)):
            pair.sparse.forward(0, sample)
    found = built.gathered(pair, site)
    assert torch.allclose(found, torch.cat(seen).double().square().sum(0))
    pair.watch(site, {}, sums.add)
    assert torch.allclose(found, sums.gram().diagonal(), rtol=1e-4)
    assert [built.rank_of(*shape) for shape in ((8, 40), (40, 8), (3, 3))] == [2, 2, 1]
    healed = built.heal(task)
    name = site.projections[0].name
    error = dict(input_projections(dense))[name].weight - dict(input_projections(model))[name].weight
    first, second = salient_low_rank(error.double(), found, built.rank_of(*error.shape))
    assert torch.allclose(healed.runtime[f"{name}.first"], first.float(), atol=1e-5)
    assert torch.allclose(healed.runtime[f"{name}.second"], second.float(), atol=1e-5)


def input_projections(model):
    return [(projection.name, projection) for site in input_sites(model) for projection in site.projections]


@pytest.mark.parametrize("rank", [0.0, -0.1, 1.5])
def test_slims_rank_is_a_share(rank):
    with pytest.raises(InvalidInput, match="a share of a matrix's shorter side"):
        registry.build("heal.method", {"slim": {"rank": rank}})


def test_with_the_whole_rank_the_dense_model_comes_back(tmp_path):
    from sparity.healing.heal.low_rank import added

    dense = tiny()
    model, masks = sparse_of(dense, "2:4")
    healed = run_method("eora", task_of(dense, model, masks, tmp_path), rank=64)
    with added(input_sites(model), healed.runtime), torch.no_grad():
        assert torch.allclose(model(IDS).logits, dense(IDS).logits, atol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())
    dense_again = copy.deepcopy(dense)
    with torch.no_grad():
        dense_again.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    masks["model.layers.1.mlp.up_proj"][:] = True
    merged = run_method("eora", task_of(dense, dense_again, masks, tmp_path), rank=64, merge=True)
    assert merged.runtime == {}
    assert torch.allclose(*(m.model.layers[1].mlp.up_proj.weight for m in (dense, dense_again)), atol=1e-4)


# ---- LoRA
