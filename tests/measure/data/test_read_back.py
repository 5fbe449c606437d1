"""A report comes back from its JSON as it was, and damage is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparity.errors import CorruptFile
from sparity.measure.data.read_back import read_back
from sparity.measure.data.report import Report

WHERE = Path("sparity.json")


def written(report):
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_every_kind_of_report_comes_back(report, kinds):
    for each in (report, *kinds.values()):
        assert read_back(Report, written(each), WHERE) == each


def test_numbers_that_are_not_finite_come_back(report):
    candidate = report.candidates[0]
    endless = replace(candidate.quality[0], perplexity=float("inf"), change=float("inf"))
    given = replace(report, candidates=(replace(candidate, quality=(endless,)),))
    assert read_back(Report, written(given), WHERE) == given


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("model"),
        lambda content: content.update(more=1),
        lambda content: content.update(parameters="many"),
        lambda content: content.update(candidates=5),
        lambda content: content["candidates"][0].update(target="half"),
        lambda content: content["candidates"][0].update(effort=None),
        lambda content: content["candidates"][0]["changes"].append({}),
    ],
)
def test_damage_is_named(report, damage):
    content = written(report)
    damage(content)
    with pytest.raises(CorruptFile, match=r"sparity\.json is damaged"):
        read_back(Report, content, WHERE)


@pytest.mark.parametrize("content", [None, 5, [], "report"])
def test_what_is_no_report_is_refused(content):
    with pytest.raises(CorruptFile, match=r"sparity\.json is damaged"):
        read_back(Report, content, WHERE)
