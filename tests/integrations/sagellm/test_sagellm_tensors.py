"""Functions of one matrix: the specification's own code, written out, beside ours."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import sparity
from sparity.errors import InvalidInput, NumericalError
from sparity.integrations import sagellm


def specified_magnitude(weight, ratio):
    threshold = torch.quantile(weight.abs(), ratio)
    return weight * (weight.abs() >= threshold)


def specified_wanda(weight, activations, ratio):
    importance = weight.abs() * activations.norm(dim=0)
    return weight * (importance >= torch.quantile(importance, ratio))


def specified_nm(weight, n, m):
    rows, columns = weight.shape
    groups = weight.view(rows, columns // m, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, groups.abs().topk(n, dim=-1).indices, True)
    return (weight * mask.view(rows, columns)).contiguous()


def specified_csr(weight):
    sparse = weight.to_sparse()
    indices, values = sparse._indices(), sparse._values()
    row_ptr = torch.zeros(weight.size(0) + 1, dtype=torch.int32)
    for i in range(indices.size(1)):
        row_ptr[indices[0, i] + 1] += 1
    return values, indices[1, :].int(), row_ptr.cumsum(0)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_magnitude_by_hand():
    weight = torch.tensor([[4.0, -1.0], [-2.0, 3.0]])
    assert sagellm.magnitude_prune(weight, 0.5).tolist() == [[4.0, 0.0], [0.0, 3.0]]
    assert sagellm.magnitude_prune(torch.ones(2, 2), 0.5).tolist() == [[0.0, 0.0], [1.0, 1.0]]  # all equal: by position


@given(st.integers(1, 9), st.integers(2, 12), st.floats(0, 0.99))
def test_magnitude_and_wanda_are_the_specifications_but_for_one_weight(rows, columns, ratio):
    """A quantile between two weights is not the count `int(ratio * size)`: one weight more or less may go."""
    weight, inputs = drawn(rows, columns), drawn(7, columns, seed=1)
    for ours, theirs in (
        (sagellm.magnitude_prune(weight, ratio), specified_magnitude(weight, ratio)),
        (sagellm.wanda_prune(weight, inputs, ratio), specified_wanda(weight, inputs, ratio)),
    ):
        assert int((ours == 0).sum()) == int(ratio * weight.numel())
        different = (ours != 0) != (theirs != 0)
        assert int(different.sum()) <= 1
        assert torch.equal(ours[~different], theirs[~different])


def test_wanda_by_hand():
    weight, inputs = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    assert sagellm.wanda_prune(weight, inputs, 0.5).tolist() == [[0.0, 1.0], [0.0, 2.0]]  # 3, 4, 1, 8


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_is_the_specifications(n, m):
    weight = drawn(6, 32)
    assert torch.equal(sagellm.apply_nm_sparsity(weight, n, m), specified_nm(weight, n, m))


def test_csr_is_the_specifications():
    weight = sagellm.apply_nm_sparsity(drawn(5, 12), 1, 4)
    weight[3] = 0
    for ours, theirs in zip(sagellm.to_csr(weight), specified_csr(weight), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_coo_and_bsr_by_hand():
    weight = torch.tensor([[0.0, 5.0, 0.0, 0.0], [6.0, 0.0, 0.0, 7.0]])
    values, rows, columns = sagellm.to_coo(weight)
    assert (values.tolist(), rows.tolist(), columns.tolist()) == ([5.0, 6.0, 7.0], [0, 1, 1], [1, 0, 3])
    blocks, columns, starts = sagellm.to_bsr(weight, 2)
    assert blocks.tolist() == [[[0.0, 5.0], [6.0, 0.0]], [[0.0, 0.0], [0.0, 7.0]]]
    assert (columns.tolist(), starts.tolist()) == ([0, 1], [0, 2])


def test_sparsegpt_of_a_layer_is_that_of_its_inputs():
    layer, inputs = nn.Linear(12, 8, bias=False), drawn(40, 12)
    wanted, _ = sparity.prune_weight(layer.weight.data, inputs, solver="sparsegpt", sparsity=0.5)
    sagellm.SparseGPT().prune_layer(layer, inputs.T @ inputs, 0.5)
    assert torch.equal(layer.weight == 0, wanted == 0)
    torch.testing.assert_close(layer.weight.data, wanted, rtol=1e-3, atol=1e-4)


def test_sparsegpt_makes_up_for_what_goes():
    """The specification's sketch only multiplies by a mask; the paper's method changes what stays."""
    layer, inputs = nn.Linear(16, 8, bias=False), drawn(64, 16) @ drawn(16, 16, seed=2)
    dense = layer.weight.data.clone()
    sagellm.SparseGPT().prune_layer(layer, inputs.T @ inputs, 0.5)
    masked = dense * (layer.weight.data != 0)
    errors = [float((inputs @ (weight - dense).T).norm()) for weight in (layer.weight.data, masked)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("gram", "error"),
    [(torch.ones(3, 3), InvalidInput), (-torch.eye(4), NumericalError), (drawn(4, 4), NumericalError)],
)
def test_what_is_no_gram_matrix_is_refused(gram, error):
    with pytest.raises(error, match="H"):
        sagellm.SparseGPT().prune_layer(nn.Linear(4, 4), gram, 0.5)


def test_dejavu_computes_the_tokens_that_matter():
    x, weight = torch.tensor([[3.0, 4.0], [0.01, 0.0], [1.0, 0.0]]), drawn(5, 2)
    found = sagellm.DejaVuSparse(threshold=0.1).forward(x, weight)
    assert torch.equal(found[[0, 2]], functional.linear(x[[0, 2]], weight))
    assert found[1].tolist() == [0.0] * 5


def test_dejavu_with_all_tokens_that_matter_is_dense_as_the_specifications_code_is():
    x, weight = drawn(5, 4), drawn(5, 4, seed=1)
    output = torch.zeros(x.size(0), weight.size(0))
    important = (x.norm(dim=-1) > 0.0).nonzero(as_tuple=False).squeeze()
    output[:, important] = functional.linear(x, weight[important])
    torch.testing.assert_close(sagellm.DejaVuSparse(0.0)(x, weight), output)


def test_dejavu_takes_a_predictor_of_neurons():
    class Neurons(sagellm.DejaVuSparse):
        def _predict_importance(self, x):
            return torch.tensor([True, False, True, True])

    x, weight = drawn(3, 2), drawn(4, 2, seed=1)
    found = Neurons()(x, weight)
    torch.testing.assert_close(found, functional.linear(x, weight) * torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(InvalidInput, match="3 tokens or 5 neurons"):
        Neurons()(x, drawn(5, 2))
