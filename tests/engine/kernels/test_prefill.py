"""Prefill: the unpacked weight is the weight, and the product is PyTorch's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_inputs import FORMATS, inputs, weight_for
from sparity.engine.kernels import native, prepare
from sparity.engine.kernels.gemv import reference
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.engine.kernels.prefill import cpu
from sparity.formats import build_format


@pytest.mark.parametrize("name", ["bitmask", "two_of_four"])
@pytest.mark.parametrize("values", ["same", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (6, 70), (33, 64), (130, 257)], ids=str)
def test_unpacked_tiles_are_the_weight(isa, name, values, shape):
    form = build_format(name)
    packed = form.pack(weight_for(name, *shape), values)
    weight, wanted = NativeWeight(packed), form.decode(packed)
    for begin, end in ((0, shape[0]), (0, min(4, shape[0])), (4 * ((shape[0] - 1) // 4), shape[0])):
        out = torch.full((end - begin, shape[1]), -1, dtype=wanted.dtype)
        status = native.library().sparity_unpack(weight.address, begin, end, out.data_ptr(), 2)
        assert status == 0
        assert torch.equal(out, wanted[begin:end])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [17, 64])
@pytest.mark.parametrize("products", ["own", "float32"])
def test_prefill(isa, name, tokens, products, monkeypatch):
    monkeypatch.setenv("SPARITY_PRODUCTS", products)
    monkeypatch.setattr(cpu, "PANEL", 64 * 200 * 2)  # several panels
    weight, x = weight_for(name, 150, 200), inputs(tokens, 200)
    packed = build_format(name).pack(weight)
    result = prepare(packed)(x)
    bound = reference.error_bound(weight, x, 200 * 2**-24) + reference.gemv(weight, x).abs() * 2**-8
    assert ((result.double() - reference.gemv(weight, x)).abs() <= bound).all()
    if name != "block":
        quantized = build_format(name).pack(weight, "int8")
        values = build_format(name).decode(quantized)
        wanted = reference.gemv_int8(values, quantized.tensors["scales"], x)
        result = prepare(quantized)(x)
        assert result.dtype == torch.bfloat16
        assert ((result.double() - wanted).abs() <= wanted.abs() * 2**-8).all()


@pytest.mark.parametrize("values", ["same", "int8"])
def test_a_prompt_by_way_of_float32_goes_through_no_product_of_another_type(values, monkeypatch):
    monkeypatch.setenv("SPARITY_PRODUCTS", "float32")
    for name in ("dense", "bitmask", "two_of_four"):
        packed = build_format(name).pack(weight_for(name, 150, 200), values)
        with RecordedProducts() as seen:
            prepare(packed)(inputs(64, 200))
        assert seen.types == {torch.float32}


class RecordedProducts(TorchDispatchMode):
    """The types of all products within the context."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in str(func):
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_int8_prompts_have_the_same_bits_either_way(monkeypatch):
    packed = build_format("bitmask").pack(weight_for("bitmask", 70, 2100), "int8")
    found = []
    for products in ("own", "float32"):
        monkeypatch.setenv("SPARITY_PRODUCTS", products)
        found.append(prepare(packed)(inputs(20, 2100)))
    assert torch.equal(*found)
