"""Weights that share an input, in one call: bit for bit what each gives alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel_inputs import inputs, weight_for
from sparity.engine.kernels import native
from sparity.engine.kernels.gemv.cpu import gemv, gemv_many
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.errors import InvalidInput
from sparity.formats import build_format

KINDS = [
    ("dense", "same"),
    ("bitmask", "same"),
    ("two_of_four", "same"),
    ({"block": {"columns": 16}}, "same"),
    ({"block": {"rows": 5, "columns": 48}}, "same"),
    ("dense", "int8"),
    ("bitmask", "int8"),
    ("two_of_four", "int8"),
    ("columns", "same"),
    ("columns", "int8"),
]


def native_weight(kind, rows, columns, seed=0):
    spec, values = kind
    name = spec if isinstance(spec, str) else "block"
    return NativeWeight(build_format(spec).pack(weight_for(name, rows, columns, seed), values))


def check(weights, x, dtype=torch.float32):
    outs = [torch.full((len(x), weight.packed.shape[0]), float("nan"), dtype=dtype) for weight in weights]
    results = gemv_many(weights, x, outs)
    assert [result is out for result, out in zip(results, outs, strict=True)] == [True] * len(weights)
    for weight, result in zip(weights, results, strict=True):
        assert torch.equal(result, gemv(weight, x, torch.empty_like(result)))


@pytest.mark.parametrize("columns", [1, 63, 130, 1000])
def test_all_formats_at_once(isa, columns):
    weights = [native_weight(kind, 1 + 9 * place, columns, place) for place, kind in enumerate(KINDS)]
    for tokens in range(1, 17):
        check(weights, inputs(tokens, columns))
    check(weights[::-1], inputs(2, columns), torch.bfloat16)
    for result, weight in zip(gemv_many(weights, inputs(2, columns)), weights, strict=True):
        assert torch.equal(result, gemv(weight, inputs(2, columns)))


def test_the_number_of_threads_changes_nothing(isa, monkeypatch):
    weights = [native_weight(kind, 70, 200, place) for place, kind in enumerate(KINDS)]
    alone = [gemv(weight, inputs(3, 200)) for weight in weights]
    for count in (1, 2, 3, 7, 64):
        monkeypatch.setattr(native, "threads", lambda count=count: count)
        for result, wanted in zip(gemv_many(weights, inputs(3, 200)), alone, strict=True):
            assert torch.equal(result, wanted)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_group(isa, data):
    columns = data.draw(st.integers(1, 300))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    weights = [native_weight(kind, data.draw(st.integers(1, 40)), columns) for kind in kinds]
    check(weights, inputs(data.draw(st.integers(1, 17)), columns))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token(isa, bad):
    weights = [native_weight(kind, 20, 150) for kind in KINDS]
    x = inputs(3, 150)
    x[1, 77] = bad
    for result, weight in zip(gemv_many(weights, x), weights, strict=True):
        assert torch.equal(result.nan_to_num(7), gemv(weight, x).nan_to_num(7))
        assert not result[1].isfinite().any()
        assert result[[0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused(isa):
    weights = [native_weight(("bitmask", "same"), rows, 100) for rows in (8, 12)]
    x = inputs(2, 100)
    with pytest.raises(InvalidInput, match=r"inputs \[tokens, 99\] are needed"):
        gemv_many([*weights, native_weight(("dense", "int8"), 8, 99)], x)
    for outs in ([torch.empty(2, 8)], [torch.empty(2, 8), torch.empty(2, 12).bfloat16()]):
        with pytest.raises(InvalidInput, match="`outs` must be 2 tensors of one type"):
            gemv_many(weights, x, outs)
    with pytest.raises(InvalidInput, match=r"`out` must be contiguous \[2, 12\]"):
        gemv_many(weights, x, [torch.empty(2, 8), torch.empty(2, 8)])
    assert [out.shape for out in gemv_many(weights, x[:0])] == [(0, 8), (0, 12)]
    assert gemv_many([], x) == []


@pytest.mark.parametrize("form", ["dense", "bitmask", "two_of_four", "block", "columns"])
@pytest.mark.parametrize("rows", [16, 63])
def test_a_result_does_not_depend_on_what_comes_with_its_input(isa, form, rows):
    weight = torch.zeros(rows, 208).bfloat16()
    weight[:, ::2] = torch.randn(rows, 104, generator=torch.Generator().manual_seed(0)).bfloat16()
    prepared = NativeWeight(build_format(form).pack(weight))
    x = torch.randn(16, 208, generator=torch.Generator().manual_seed(1)).bfloat16()
    alone = torch.cat([gemv_many([prepared], x[token : token + 1])[0] for token in range(16)])
    for tokens in range(2, 17):
        assert torch.equal(gemv_many([prepared], x[:tokens])[0], alone[:tokens])
