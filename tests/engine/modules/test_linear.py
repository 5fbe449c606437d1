"""Single layers of the engine, without a model around them."""

import pytest
import torch
from torch import nn

import sparity
from sparity.engine.modules.linear import DenseLinear, PackedLinear
from sparity.errors import InvalidInput


def test_a_dense_weight_that_becomes_smaller_where_it_lies():
    layer = nn.Linear(32, 8, bias=False).bfloat16()
    DenseLinear.adopt(layer)
    x = torch.ones(3, 32).bfloat16()
    with torch.no_grad():
        whole = layer(x)
        layer.weight.data = layer.weight.data[:5]
        assert torch.equal(layer(x), whole[:, :5])


def test_one_packed_layer_by_itself(tiny):
    layer = sparity.attach(tiny("gpt2"), form="bitmask").transformer.h[0].mlp.c_fc
    assert isinstance(layer, PackedLinear)
    assert layer.state_dict()["weight"].shape == (32, 128)
    assert layer.weight.shape == (128, 32)
    with pytest.raises(InvalidInput, match="cannot be moved to meta"):
        layer.to("meta")
