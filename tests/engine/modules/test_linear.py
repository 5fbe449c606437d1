"""Single layers of the engine, without a model around them."""

import pytest
import torch
from torch import nn

import sparity
from sparity.engine.kernels import native
from sparity.engine.kernels.prepared import Prepared
from sparity.engine.modules.linear import DenseLinear, Head, PackedLinear
from sparity.errors import InvalidInput


def test_a_dense_weight_that_becomes_smaller_where_it_lies():
    layer = nn.Linear(32, 8, bias=False).bfloat16()
    DenseLinear.adopt(layer)
    x = torch.ones(3, 32).bfloat16()
    with torch.no_grad():
        whole = layer(x)
        layer.weight.data = layer.weight.data[:5]
        assert torch.equal(layer(x), whole[:, :5])


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
def test_a_head_gives_an_input_the_same_bits_whatever_comes_with_it(monkeypatch):
    layer = nn.Linear(300, 50, bias=True).bfloat16()
    Head.adopt(layer)
    monkeypatch.setattr(Prepared, "__call__", lambda *_: pytest.fail("the kernel depends on the number of inputs"))
    x = torch.randn(2, 20, 300).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x)[1, 7], layer(x[1, 7]))
    layer.release()
    assert type(layer) is nn.Linear


def test_one_packed_layer_by_itself(tiny):
    layer = sparity.attach(tiny("gpt2"), form="bitmask").transformer.h[0].mlp.c_fc
    assert isinstance(layer, PackedLinear)
    assert layer.state_dict()["weight"].shape == (32, 128)
    assert layer.weight.shape == (128, 32)
    with pytest.raises(InvalidInput, match="cannot be moved to meta"):
        layer.to("meta")
