"""Inputs without the channels that do not count: the compiled kernels against the rule."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparity.engine.kernels import native
from sparity.engine.kernels.skip.cpu import NativeSkip, skip
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.errors import InvalidInput

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
BFLOAT16 = torch.bfloat16
SCALES = ("constant", "rms", "top", "statistical")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BFLOAT16)


def same(found, wanted):
    """Bit for bit; any NaN is a NaN."""
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num().view(torch.int16), wanted.nan_to_num().view(torch.int16))


def check(rule, x):
    made, out = NativeSkip(rule, x.shape[1]), torch.full_like(x, float("nan"))
    assert skip(made, x, out=out) is out
    wanted = rule.apply(x)
    same(out, wanted)
    same(skip(made, x), wanted)
    inside = x.clone()
    same(skip(made, inside, out=inside), wanted)


def rules(columns, seed=1):
    drawn = torch.Generator().manual_seed(seed)
    for threshold in (torch.tensor(0.7), torch.rand(columns, generator=drawn)):
        for centre in (None, random(columns, seed=seed + 1)):
            for scale in SCALES:
                yield SkipRule(threshold, centre, scale, kept=max(1, columns // 3), deviations=0.3)


@pytest.mark.parametrize("columns", [1, 15, 16, 63, 200, 1500])
def test_every_rule(isa, columns):
    x = random(3, columns)
    for rule in rules(columns):
        check(rule, x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(isa, bad):
    x = random(3, 40)
    x[0, 0], x[1, 39], x[2, 5:9] = bad, bad, bad
    for rule in rules(40):
        check(rule, x)
    for rule in (SkipRule(torch.tensor(torch.inf)), SkipRule(torch.tensor(torch.inf), scale="top", kept=1)):
        check(rule, x)


def test_by_hand(isa):
    x = torch.tensor([[0.5, -0.5, 0.75, -1.0, math.nan, -0.25]]).to(BFLOAT16)
    thresholds = torch.tensor([0.5, 0.49, 1.0, 1.5, 9.0, 0.0])
    centre = torch.tensor([1.0, -0.25, 2.0, 0.75, 0.0, -0.25]).to(BFLOAT16)
    plain = skip(NativeSkip(SkipRule(thresholds), 6), x)[0]
    centred = skip(NativeSkip(SkipRule(thresholds, centre), 6), x)[0]
    assert plain[[0, 1, 2, 3, 5]].tolist() == [0.0, -0.5, 0.0, 0.0, -0.25]  # strictly: 0.5 is not above 0.5
    assert centred[[0, 1, 2, 3, 5]].tolist() == [0.0, 0.0, -1.25, -1.75, 0.0]
    assert plain[4].isnan()
    assert centred[4].isnan()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("centred", [False, True])
def test_a_whole_token_stays_as_it_is(isa, scale, centred):
    x, centre = random(4, 50), random(50, seed=1) if centred else None
    rule = SkipRule(torch.tensor(1.0), centre, scale, kept=5, deviations=1.0)
    wanted = rule.apply(x)
    wanted[[1, 3]] = x[[1, 3]]
    same(skip(NativeSkip(rule, 50), x, torch.tensor([0, 1, 0, 1], dtype=torch.uint8)), wanted)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rule(isa, data):
    """Values from a short list, so that many are equal, and thresholds that are 0 or infinite among them."""
    columns, tokens = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 3))
    numbers = st.sampled_from((0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.0, 1e-40, 1e30, math.inf, math.nan))
    drawn = data.draw(st.lists(numbers, min_size=tokens * columns, max_size=tokens * columns))
    limits = st.sampled_from((0.0, 0.25, 1.0, 1.5, math.inf))
    threshold = torch.tensor(data.draw(st.lists(limits, min_size=columns, max_size=columns)))
    if data.draw(st.booleans()):
        threshold = threshold[0]
    scale, kept = data.draw(st.sampled_from(SCALES)), data.draw(st.integers(1, columns + 2))
    centre = random(columns, seed=data.draw(st.integers(0, 99))) if data.draw(st.booleans()) else None
    rule = SkipRule(threshold, centre, scale, kept, data.draw(st.sampled_from((-1.0, 0.0, 0.7))))
    check(rule, torch.tensor(drawn).view(tokens, columns).to(BFLOAT16))


@pytest.mark.parametrize("columns", [4096, 14336])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_top_of_many(isa, columns, share):
    x = random(2, columns)  # 8 bits of mantissa: many are equal
    check(SkipRule(torch.tensor(1.0), scale="top", kept=int(share * columns)), x)
    thresholds = torch.rand(columns, generator=torch.Generator().manual_seed(3))
    check(SkipRule(thresholds, random(columns, seed=4), "top", int(share * columns)), x)


def test_the_number_of_threads_changes_nothing(isa, monkeypatch):
    x = random(9, 3000)
    for rule in rules(3000):
        made = NativeSkip(rule, 3000)
        wanted = skip(made, x)
        monkeypatch.setattr(native, "threads", lambda: 3)
        same(skip(made, x), wanted)
        monkeypatch.undo()


def test_what_does_not_fit_is_refused():
    for rule in (SkipRule(torch.ones(5)), SkipRule(torch.tensor(-1.0)), SkipRule(torch.tensor(math.nan))):
        with pytest.raises(InvalidInput, match="one threshold, or 6, none negative"):
            NativeSkip(rule, 6)
    for centre in (torch.ones(6), torch.ones(5).bfloat16()):
        with pytest.raises(InvalidInput, match=r"a centre \[6\] in bfloat16"):
            NativeSkip(SkipRule(torch.tensor(1.0), centre), 6)
    made, x = NativeSkip(SkipRule(torch.tensor(1.0)), 6), random(2, 6)
    for wrong in (x.float(), x[:, :5], random(6, 2).T):
        with pytest.raises(InvalidInput, match="x must be contiguous"):
            skip(made, wrong)
    with pytest.raises(InvalidInput, match="out must be contiguous"):
        skip(made, x, out=random(3, 6))
    for whole in (torch.ones(3, dtype=torch.uint8), torch.ones(2)):
        with pytest.raises(InvalidInput, match=r"`whole` must be uint8 \[2\]"):
            skip(made, x, whole)
