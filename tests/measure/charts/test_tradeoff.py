"""Quality against speed: who is beaten, and where the marks lie."""

import math
import re
from xml.etree import ElementTree

from sparity.measure.charts.tradeoff import dominated, tradeoff
from sparity.measure.data.report import Contestant, Spread


def contestant(name, rate, perplexity, kind="sparse"):
    return Contestant(name, Spread(rate, rate - 1, rate + 1), perplexity, kind)


FIELD = [
    contestant("dense", 20, 30, "dense"),
    contestant("slow", 10, 31, "peer"),
    contestant("half", 40, 40),
    contestant("worse half", 40, 50),
    contestant("twin", 40, 40),
    contestant("broken", 60, math.inf),
]


def test_who_is_beaten_and_by_whom():
    assert dominated(FIELD) == {"slow": "dense", "worse half": "half"}  # twins beat no one; the fastest is never beaten
    assert dominated(FIELD[:1]) == {}


def circles(drawing):
    root = ElementTree.fromstring(drawing)
    found = root.iter("{http://www.w3.org/2000/svg}circle")
    return {circle[0].text.split(":")[0]: circle.attrib for circle in found}


def test_faster_is_further_right_better_is_lower_and_the_beaten_are_hollow():
    drawing = tradeoff("quality against speed", FIELD)
    drawn = circles(drawing)
    assert set(drawn) == {"dense", "slow", "half", "worse half", "twin"}  # infinity has no place
    x = {name: float(mark["cx"]) for name, mark in drawn.items()}
    y = {name: float(mark["cy"]) for name, mark in drawn.items()}
    assert x["slow"] < x["dense"] < x["half"] == x["twin"]
    assert y["dense"] > y["slow"] > y["half"] > y["worse half"]  # downwards is larger in SVG
    hollow = {name for name, mark in drawn.items() if "page" in mark["fill"]}
    assert hollow == {"slow", "worse half"}
    assert "broken: perplexity inf" in drawing
    assert "worse half: perplexity 50.00" in drawing
    assert "beaten by half" in drawing
    assert len({mark["stroke"] for mark in drawn.values()}) == 3


def test_speed_begins_at_zero_so_that_lengths_are_ratios():
    drawn = circles(tradeoff("title", FIELD[:3]))
    left = 80.0
    assert math.isclose((float(drawn["half"]["cx"]) - left) / (float(drawn["dense"]["cx"]) - left), 2.0, rel_tol=1e-2)
    assert re.search(r">0<", tradeoff("title", FIELD[:3]))


def test_no_label_lies_on_a_whisker():
    field = [Contestant("alone", Spread(20, 15, 60), 30, "sparse"), Contestant("exact", Spread(70, 70, 70), 90, "peer")]
    root = ElementTree.fromstring(tradeoff("title", field))
    mark = {name: float(circle["cy"]) for name, circle in circles(tradeoff("title", field)).items()}
    label = {text.text: float(text.get("y")) for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert abs(label["exact"] - 4 - mark["exact"]) < 0.2  # beside its mark
    assert abs(label["alone"] - 4 - mark["alone"]) >= 14  # which a line to the right goes through
