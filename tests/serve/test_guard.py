"""A dense shadow: what it says of answers, when it takes over, and when it gives back."""

import random

import pytest
import torch
from transformers.cache_utils import DynamicCache

from served_http import open_llama, serving
from sparity.engine.kernels import native
from sparity.errors import InvalidInput
from sparity.serve.guard.guard import Bounds, Guard
from sparity.serve.sampling import Sampling
from sparity.serve.sequence import Answer, Order
from sparity.serve.served_model import open_model
from sparity.serve.service import Service

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
PROMPTS = [[5 + at, 70, 90 + 3 * at, 11] for at in range(40)]


@pytest.fixture(scope="module")
def pair():
    return open_llama(), open_llama()


@pytest.fixture
def damaged(pair):
    """Both models, and a function that damages the sparse one or makes it whole again."""
    weights = {name: weight.clone() for name, weight in pair[0].execution.model.named_parameters()}

    def damage(whole=False):
        with torch.no_grad():
            for name, weight in pair[0].execution.model.named_parameters():
                weight.copy_(weights[name])
                if not whole and "down_proj" in name:
                    weight[::2] = 0

    yield *pair, damage
    damage(whole=True)


def answered(service, prompts):
    """Requests one after another, everything between them done."""
    for prompt in prompts:
        served = service.route(None)
        order = Order(prompt=tuple(prompt), sampling=Sampling(seed=prompt[0]), most=6, ignore_end=True)
        served.scheduler.submit(Answer(order, served.tokenizer, served.ends, lambda piece: None))
        busy = True
        while busy:
            steps = [model.scheduler.step() for model in (service._guard.sparse, service._guard.dense)]
            busy = service._guard.go_on() or any(steps)


def test_equal_models_are_not_a_bit_apart(pair):
    guard = Guard(*pair, Bounds(share=1, kl=1e-6))
    answered(Service([pair[0]], guard), PROMPTS[:6])
    assert (guard.scored, guard.total, guard.alarms, guard.serving) == (6, 0.0, 0, guard.sparse)


def test_the_number_is_the_divergence_of_the_answer_s_tokens(damaged):
    sparse, dense, damage = damaged
    damage()
    guard = Guard(sparse, dense, Bounds(share=1, kl=100))
    prompt = (5, 70, 90, 11)
    order = Order(prompt=prompt, sampling=Sampling(seed=3), most=9, ignore_end=True)
    answer = Answer(order, sparse.tokenizer, sparse.ends, lambda piece: None)
    service = Service([sparse], guard)
    sparse.scheduler.submit(answer)
    while sparse.scheduler.step() or dense.scheduler.step() or guard.go_on():
        pass
    assert service.route(None) is sparse
    shares = []
    for served in (dense, sparse):
        model = served.execution.model
        with torch.no_grad():
            logits = model(torch.tensor([answer.ids]), past_key_values=DynamicCache(config=model.config)).logits[0]
        shares.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
    expected = (shares[0].exp() * (shares[0] - shares[1])).sum(-1)
    assert len(expected) == 9
    assert guard.total == pytest.approx(float(expected.mean()), rel=1e-4)
    assert guard.total > 0.01


def test_the_dense_model_takes_over_and_gives_back(damaged):
    sparse, dense, damage = damaged
    guard = Guard(sparse, dense, Bounds(share=1, kl=0.01, alarm=0.1, back=0.1))
    service = Service([sparse], guard)
    answered(service, PROMPTS[:5])
    assert guard.serving is sparse
    damage()
    answered(service, PROMPTS[:12])
    assert (guard.alarms, guard.returns, service.route("llama")) == (1, 0, dense)
    assert service.route("other") is None
    damage(whole=True)
    answered(service, PROMPTS)
    assert (guard.alarms, guard.returns, service.route(None)) == (1, 1, sparse)


def test_a_share_of_the_answers_is_scored(pair):
    guard = Guard(*pair, Bounds(share=0.25))
    draws = random.Random(0)
    guard._draws.seed(0)
    service = Service([pair[0]], guard)
    answered(service, PROMPTS)
    assert guard.scored == sum(draws.random() < 0.25 for _ in PROMPTS) > 0
    none = Guard(*pair, Bounds(share=0))
    answered(Service([pair[0]], none), PROMPTS[:3])
    assert none.scored == 0


def test_over_the_wire(damaged):
    sparse, dense, damage = damaged
    damage()
    guard = Guard(sparse, dense, Bounds(share=1, kl=0.01, alarm=0.5))
    with serving([sparse], guard=guard) as served:
        asked = {"prompt": PROMPTS[0], "max_tokens": 6, "ignore_eos": True, "temperature": 0}
        first = served.post("/v1/completions", asked).json()
        assert first["system_fingerprint"].endswith("-sparse")
        for prompt in PROMPTS[:10]:
            served.post("/v1/completions", {**asked, "prompt": prompt})
        served.wait(lambda: guard.serving is dense)
        last = served.post("/v1/completions", asked).json()
        assert last["system_fingerprint"].endswith("-dense")
        assert last["model"] == first["model"] == "llama"
        text = served.http.get("/metrics").text
        assert [card["id"] for card in served.http.get("/v1/models").json()["data"]] == ["llama"]
    assert 'sparity:guard_alarms_total{model_name="llama"} 1.0' in text
    assert 'sparity:guard_dense{model_name="llama"} 1.0' in text
    assert 'sparity:request_success_total{engine="dense",finished_reason="length",model_name="llama"}' in text


def test_models_with_other_tokens(pair, tmp_path):
    other = open_model("zoo:llama", name="llama", context=128)
    with pytest.raises(InvalidInput, match="the dense model takes 128 tokens, the sparse one 256: lower --context"):
        Guard(pair[0], other, Bounds())
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(InvalidInput, match="the dense model has other tokens than the sparse one"):
        Guard(pair[0], other, Bounds())
