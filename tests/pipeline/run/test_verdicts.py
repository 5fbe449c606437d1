"""Limits of a recipe: every text must keep them, and what was not measured keeps none."""

from dataclasses import replace

import pytest

from sparity.measure.data.report import Quality
from sparity.pipeline.run.measuring import judge
from sparity.recipe import Accept

MEASURED = Quality("a", 64, 100, 10.0, 10.4, 0.04, "good", 0.1, 0.9)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [((0.04,), True), ((0.04, 0.06), False), ((0.06, 0.04), False), ((0.04, float("nan")), False), ((), False)],
)
def test_every_text_must_keep_a_limit(changes, passed):
    """NaN keeps none, wherever it stands."""
    texts = tuple(replace(MEASURED, change=change, kl=change) for change in changes)
    verdicts = judge(Accept(perplexity="+5%", kl=0.05, decode="1.3x"), texts, None)
    assert [verdict.passed for verdict in verdicts] == [passed, passed, False]
    if not changes:
        assert [verdict.reached for verdict in verdicts] == ["not measured"] * 3
