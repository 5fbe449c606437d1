"""Products by way of float32: the exact sum, rounded once, however many panels there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from sparity.products import choice, panels

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half the last place, relative
SMALLEST = {torch.bfloat16: 2**-134, torch.float16: 2**-25}  # half the last place of a subnormal


def drawn(seed, *shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_and_bound(x, weight, bias, dtype):
    """The exact sum in float64, and how far it may be moved: a float32 sum of these terms, and one rounding."""
    exact, size = x.double() @ weight.double(), x.double().abs() @ weight.double().abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    summed = (len(weight) + 1) * 2**-24 * size
    return exact, summed + (exact.abs() + summed) * UNIT[dtype] + SMALLEST[dtype]


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@settings(max_examples=25, deadline=None)
@given(some.integers(1, 40), some.integers(1, 90), some.integers(1, 400), some.booleans(), some.integers(0, 9))
def test_a_product_is_the_exact_sum_rounded_once(dtype, tokens, columns, rows, biased, seed):
    x, weight = drawn(seed, tokens, columns, dtype=dtype), drawn(seed + 1, columns, rows, dtype=dtype)
    bias = drawn(seed + 2, rows, dtype=dtype) if biased else None
    exact, bound = exact_and_bound(x, weight, bias, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "PANEL", columns * 4 * panels.FEWEST)  # several panels from 129 rows on
        patch.setattr(panels, "TURNED", 20)
        ours = panels.multiply(x, weight, bias)
    own = x @ weight if bias is None else torch.addmm(bias, x, weight)
    assert ours.dtype == dtype
    assert ((ours.double() - exact).abs() <= bound).all()
    if dtype == torch.bfloat16:  # some processors add up float16 in float16
        assert ((own.double() - exact).abs() <= bound).all()  # so the two differ by twice the bound at most


def test_a_case_by_hand(monkeypatch):
    monkeypatch.setenv("SPARITY_PRODUCTS", "float32")
    monkeypatch.setattr(panels, "FEW", 0)
    x = torch.tensor([[256.0, 1.0, 1.0]]).bfloat16()  # 258 has no place between the bfloat16 numbers 258 and 260
    weight = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]).bfloat16()
    assert panels.linear(x, weight).tolist() == [[258.0, 256.0]]  # 257 is rounded to even, once; term by term both are


def test_a_weight_may_be_transposed_or_a_slice(monkeypatch):
    weight, x = drawn(0, 300, 48, dtype=torch.bfloat16), drawn(1, 20, 48, dtype=torch.bfloat16)
    wide = (x.float() @ weight.float().T).bfloat16()
    monkeypatch.setattr(panels, "PANEL", 48 * 4 * panels.FEWEST)
    for given_weight in (weight.T, weight.T.contiguous()):
        assert torch.allclose(panels.multiply(x, given_weight).float(), wide.float(), rtol=2**-7, atol=1e-6)
    assert torch.equal(panels.multiply(x.float(), weight.T), panels.multiply(x, weight.T))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 1024), (2, 4, 1025), (4, 3, 3000)], ids=str)
@pytest.mark.parametrize("products", ["own", "float32"])
def test_sums_of_int8_products_are_exact(shape, products, monkeypatch):
    monkeypatch.setenv("SPARITY_PRODUCTS", products)
    tokens, rows, columns = shape
    for x, weight in (
        (torch.full((tokens, columns), -128, dtype=torch.int8), torch.full((rows, columns), -128, dtype=torch.int8)),
        (torch.full((tokens, columns), 127, dtype=torch.int8), torch.full((rows, columns), -127, dtype=torch.int8)),
        (
            torch.randint(-128, 128, (tokens, columns), dtype=torch.int8),
            torch.randint(-128, 128, (rows, columns), dtype=torch.int8),
        ),
    ):
        found = panels.multiply_bytes(x, weight)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize(
    ("products", "tokens", "widened"), [("float32", 9, True), ("float32", 8, False), ("own", 99, False)]
)
def test_a_layer_goes_by_way_of_float32_only_where_that_is_faster(products, tokens, widened, monkeypatch):
    monkeypatch.setenv("SPARITY_PRODUCTS", products)
    seen = []
    multiply = panels.multiply
    monkeypatch.setattr(panels, "multiply", lambda *a: seen.append(1) or multiply(*a))
    x, weight = drawn(0, 1, tokens, 16, dtype=torch.bfloat16), drawn(1, 4, 16, dtype=torch.bfloat16)
    assert panels.linear(x, weight).shape == (1, tokens, 4)
    assert panels.linear(x.float(), weight.float()).dtype == torch.float32
    assert bool(seen) == widened
    assert choice.emulated(torch.bfloat16) == (products == "float32")
