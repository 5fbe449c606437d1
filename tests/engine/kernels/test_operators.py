"""The kernels as operators that torch.compile traces past: same results, known shapes, gradients."""

import pytest
import torch

from sparity.engine.kernels import native, operators
from sparity.engine.kernels.prepared import prepare, prepared_at
from sparity.engine.modules.linear import DenseLinear, PackedLinear
from sparity.engine.modules.linear import multiply as eager_multiply
from sparity.errors import InvalidInput
from sparity.formats import build_format, unpack


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Each test compiles anew: PyTorch gives up on a function that it compiled too often."""
    torch.compiler.reset()


def packed_linear(bias=True):
    torch.manual_seed(0)
    weight = torch.randn(12, 32).bfloat16() * (torch.rand(12, 32) < 0.5)
    layer = PackedLinear("w", 32, 12, torch.nn.Parameter(torch.randn(12).bfloat16()) if bias else None)
    layer.give(build_format("bitmask").pack(weight))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 20, 32)])
def test_a_packed_layer_is_one_graph(bias, shape):
    layer, x = packed_linear(bias), torch.randn(shape).bfloat16()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_a_weight_that_is_given_later_is_the_one_that_counts():
    layer, x = packed_linear(), torch.randn(3, 32).bfloat16()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        first = compiled(x)
        layer.give(build_format("bitmask").pack(2 * layer.weight))
        assert torch.equal(compiled(x), layer(x))
        assert not torch.equal(compiled(x), first)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_reach_the_input(backend):
    layer = packed_linear()
    plain, traced = (torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    layer(plain).sum().backward()
    torch.compile(layer, backend=backend, fullgraph=True)(traced).sum().backward()
    assert torch.equal(plain.grad, traced.grad)
    torch.testing.assert_close(plain.grad, layer.weight.float().sum(0).expand(3, 32))


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_a_dense_layer_is_one_graph(tokens):
    layer = torch.nn.Linear(32, 12).bfloat16()
    x = torch.randn(tokens, 32).bfloat16()
    wanted = layer(x)
    DenseLinear.adopt(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), wanted, rtol=2**-7, atol=1e-3)
    compiled(x).sum().backward()
    assert layer.weight.grad is not None


def test_operators_keep_the_rules_of_pytorch():
    prepared = prepare(build_format("bitmask").pack(torch.randn(12, 32).bfloat16()))
    weight, x = (prepared.handle, 12, 32), torch.randn(3, 32).bfloat16()
    torch.library.opcheck(operators.multiply, (x, *weight))
    torch.library.opcheck(operators.multiply, (x.float().requires_grad_(), *weight))
    torch.library.opcheck(operators.unpacked, (x, *weight))
    torch.library.opcheck(operators.linear, (x, torch.randn(12, 32).bfloat16()))
    assert torch.equal(operators.multiply(x, *weight), eager_multiply(x, prepared))
    assert torch.equal(operators.unpacked(x, *weight), unpack(prepared.packed))


def test_a_weight_that_is_gone_is_refused():
    handle = prepare(build_format("dense").pack(torch.ones(4, 4).bfloat16())).handle
    with pytest.raises(InvalidInput, match=f"no packed weight has the handle {handle}"):
        prepared_at(handle)


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
def test_attention_is_an_operator():
    q, k, v = (torch.randn(2, size).bfloat16() for size in (64, 32, 32))
    cos, sin = torch.randn(2, 16).cos().bfloat16(), torch.randn(2, 16).sin().bfloat16()
    keys, values = (torch.randn(1, 2, 8, 16).bfloat16() for _ in range(2))
    lengths, mass, fresh = torch.tensor([[3, 5]]), torch.zeros(1, 2, 8), torch.tensor([2])
    arguments = (q, k, v, cos, sin, keys, values, lengths, 0.25, mass, fresh)
    torch.library.opcheck(operators.attend, arguments)
    eager, traced = ([part.clone() for part in (keys, values, mass)] for _ in range(2))

    def attended(held, call):
        return call(q, k, v, cos, sin, held[0], held[1], lengths, 0.25, held[2], fresh)

    wanted = attended(eager, operators.attend)
    found = attended(traced, torch.compile(operators.attend, backend="aot_eager", fullgraph=True))
    assert torch.equal(found, wanted)
    assert all(torch.equal(one, other) for one, other in zip(eager, traced, strict=True))
    assert not torch.equal(eager[0], keys)
    assert abs(float(eager[2].sum()) - 8) < 1e-4  # two tokens, each of four query heads gives 1 away
