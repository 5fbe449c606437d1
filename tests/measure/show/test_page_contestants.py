"""The end of the demo's page: what each model answers, also where that is nothing."""

import dataclasses

from sparity.measure.data.report import Contestant, Spread
from sparity.measure.show.page_contestants import contestants_section


def test_an_answer_that_is_empty_is_said_to_be(report):
    said = {"dense": {"Who?": "I <am>."}, "half": {"Who?": ""}}
    field = tuple(Contestant(name, Spread(9, 8, 10), 20, "sparse", 100, answers) for name, answers in said.items())
    shown = contestants_section(dataclasses.replace(report, contestants=field))
    assert "<li><b>dense:</b> I &lt;am&gt;.</li>" in shown
    assert "<li><b>half:</b> (nothing: the likeliest first token ends the answer)</li>" in shown
    assert contestants_section(dataclasses.replace(report, contestants=())) == ""
