"""Nearly orthogonal updates."""

import pytest
import torch

import zoo_muon


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (3, 16, 8)])
def test_an_update_has_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(zoo_muon.orthogonal(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_expert_matrices_are_made_orthogonal_one_by_one():
    stack = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(1))
    alone = torch.stack([zoo_muon.orthogonal(matrix) for matrix in stack])
    torch.testing.assert_close(zoo_muon.orthogonal(stack), alone)
