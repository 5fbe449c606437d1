"""The references themselves, by hand."""

import torch

from sparity.engine.kernels.gemv import reference


def test_gemv():
    weight, x = torch.tensor([[1.0, 0, 2], [0, -3, 0]]), torch.tensor([[1.0, 10, 100]])
    assert reference.gemv(weight, x).tolist() == [[201, -30]]
    x[0, 1] = float("inf")
    assert reference.gemv(weight, x).isnan().tolist() == [[True, False]]  # 0 * inf


def test_quantised():
    x = torch.tensor([[127.0, -63.5, 0.4, 1.5], [0, 0, 0, 0]])
    values, scales = reference.quantize_tokens(x)
    assert values.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0]]
    assert scales.tolist() == [1, 1]
    weight, weight_scales = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8), torch.tensor([0.5])
    assert reference.gemv_int8(weight, weight_scales, x).tolist() == [[(127 - 128 + 8) * 0.5], [0]]
