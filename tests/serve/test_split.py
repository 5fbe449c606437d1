"""Another model that answers a share of the requests."""

import random

import pytest

from served_http import open_llama, serving
from sparity.errors import InvalidInput
from sparity.serve.served_model import open_model
from sparity.serve.service import Service, Split

ASKED = {"model": "llama", "prompt": [5, 70, 90], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def other():
    return open_llama()


def test_a_share_goes_to_the_other_model_and_both_are_counted(llama, other):
    with serving([llama], split=Split(other, 0.4)) as served:
        served.service._draws.seed(1)
        draws = random.Random(1)
        expected = ["other" if draws.random() < 0.4 else llama.kind for _ in range(12)]
        answers = [served.post("/v1/completions", ASKED).json() for _ in range(12)]
        assert [answer["system_fingerprint"].rpartition("-")[2] for answer in answers] == expected
        assert len({answer["choices"][0]["text"] for answer in answers}) == 1  # they have the same weights here
        assert {answer["model"] for answer in answers} == {"llama"}
        line = 'sparity:request_success_total{{engine="{}",finished_reason="length",model_name="llama"}} {}'
        wanted = [line.format(kind, float(expected.count(kind))) for kind in ("other", llama.kind)]
        served.wait(lambda: all(one in served.http.get("/metrics").text for one in wanted))


@pytest.mark.parametrize(("share", "kind"), [(0.0, "model"), (1.0, "other")])
def test_none_and_all(llama, other, share, kind):
    service = Service([llama], split=Split(other, share))
    assert {service.route(name).kind for name in (None, "llama") for _ in range(9)} == {kind}
    assert service.route("else") is None


def test_other_tokens(llama):
    with pytest.raises(InvalidInput, match="the other model takes 64 tokens, the model one 256: lower --context"):
        Service([llama], split=Split(open_model("zoo:llama", name="llama", context=64), 0.5))
