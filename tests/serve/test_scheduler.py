"""Who gets a token when, what is reused, and what becomes of answers that cannot be finished."""

import time

import pytest
import torch

import sparity
from served import Letters, Received, by_itself, execution_of
from sparity.engine.kernels import native
from sparity.errors import InvalidInput
from sparity.serve.execution.alone import Alone
from sparity.serve.execution.steps import Steps
from sparity.serve.prefixes import BLOCK, Prefixes
from sparity.serve.sampling import Sampling
from sparity.serve.scheduler import Scheduler, run_to_end
from sparity.serve.sequence import Order

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
GREEDY = Sampling(temperature=0)
PROMPT = tuple((3 * at) % 97 for at in range(150))


@pytest.fixture
def model(tiny):
    return sparity.attach(tiny("llama"))


def order(prompt=PROMPT, **options):
    return Order(prompt=tuple(prompt), **{"sampling": GREEDY, "most": 4, "ignore_end": True, **options})


def test_greedy_tokens_are_those_of_generate(model):
    prompt = PROMPT[:20]
    expected = model.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=12, max_new_tokens=12)
    ids, text, tokens, _, finish = by_itself(model, order(prompt, most=12))
    assert ids == expected[0].tolist()
    assert (text, len(tokens), finish) == (Letters().decode(ids[20:]), 12, "length")


def test_known_beginnings_are_not_read_again(model):
    execution = Steps(model, 1, 256, 32)
    scheduler = Scheduler(execution, Prefixes(execution, 10 * execution.block_bytes(BLOCK)))
    first, second, other = Received(order()), Received(order()), Received(order((*PROMPT[:64], *PROMPT)))
    run_to_end(scheduler, [first.answer, second.answer, other.answer])
    assert [one.answer.reused for one in (first, second, other)] == [0, 2 * BLOCK, BLOCK]
    assert first.outcome == second.outcome
    assert (scheduler.queried, scheduler.hits) == (150 + 150 + 214, 192)
    assert scheduler.prefixes.held == 4 * execution.block_bytes(BLOCK)  # 2 of the first, 2 of the last one's own


def test_the_answer_becomes_part_of_what_is_known(model):
    execution = Steps(model, 1, 192, 32)
    scheduler = Scheduler(execution, Prefixes(execution, 10 * execution.block_bytes(BLOCK)))
    first = Received(order(PROMPT[:60], most=10))
    run_to_end(scheduler, [first.answer])
    turn = order((*first.answer.ids, 5, 6))
    second = Received(turn)
    run_to_end(scheduler, [second.answer])
    assert second.answer.reused == BLOCK
    assert second.outcome == by_itself(model, turn, context=192)


def test_what_was_used_longest_ago_goes_first(model):
    execution = Steps(model, 1, 192, 32)
    prefixes = Prefixes(execution, 2 * execution.block_bytes(BLOCK))
    scheduler = Scheduler(execution, prefixes)
    texts = [tuple((at * step) % 97 for at in range(65)) for step in (1, 2, 3)]
    received = [Received(order(texts[at])) for at in (0, 1, 0, 2, 0, 1)]
    run_to_end(scheduler, [one.answer for one in received])
    assert [one.answer.reused for one in received] == [0, 0, 64, 0, 64, 0]
    assert prefixes.held == 2 * execution.block_bytes(BLOCK)


def test_a_prompt_leaves_room_for_those_that_go_on(model):
    scheduler = Scheduler(Steps(model, 2, 192, 16))
    going, reading = Received(order(PROMPT[:3], most=30)), Received(order(PROMPT[:100]))
    scheduler.submit(going.answer)
    scheduler.step()
    scheduler.submit(reading.answer)
    scheduler.step()
    assert (going.answer.made, reading.answer.computed, scheduler.tokens) == (2, 15, 16)
    while reading.answer.made == 0:
        scheduler.step()
    assert going.answer.made == 1 + -(-100 // 15)


def test_first_come_first_served(model):
    scheduler = Scheduler(Steps(model, 1, 64, 16))
    received = [Received(order(PROMPT[:5], most=2)) for _ in range(3)]
    for one in received:
        scheduler.submit(one.answer)
    scheduler.step()
    assert [one.answer.slot for one in received] == [0, None, None]
    assert [len(scheduler.waiting), len(scheduler.running)] == [2, 1]
    scheduler.cancel(received[1].answer)
    while scheduler.step():
        pass
    assert [one.answer.finish for one in received] == ["length", None, "length"]
    assert received[1].pieces == []


def test_time_that_is_over(model):
    scheduler = Scheduler(Steps(model, 1, 64, 16))
    late = Received(order(PROMPT[:5], most=50, deadline=time.monotonic() + 0.05))
    never = Received(order(PROMPT[:5], deadline=time.monotonic()))
    for one in (late, never):
        scheduler.submit(one.answer)
    scheduler.step()
    assert (never.pieces[-1].finish, late.answer.finish) == ("timeout", None)
    time.sleep(0.06)
    scheduler.step()
    assert (late.pieces[-1].finish, late.answer.slot, scheduler.running) == ("timeout", None, {})


def test_logits_that_are_no_numbers_end_one_answer_only(model):
    scheduler = Scheduler(Steps(model, 2, 64, 16))
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("nan")  # the head is not tied
    bad, good = Received(order((5, 77, 6))), Received(order(PROMPT[:5]))
    run_to_end(scheduler, [bad.answer, good.answer])
    assert (bad.answer.finish, bad.pieces[-1].message) == ("error", "the model gave logits that are NaN or infinite")
    assert good.outcome == by_itself(model, order(PROMPT[:5]))


def test_a_step_that_fails_ends_its_answers_and_the_next_ones_go_on(model, monkeypatch):
    scheduler = Scheduler(Steps(model, 1, 64, 16))
    first, second = Received(order(PROMPT[:5])), Received(order(PROMPT[:5]))
    for one in (first, second):
        scheduler.submit(one.answer)
    with monkeypatch.context() as patched:
        patched.setattr(scheduler.execution, "run", lambda parts: (_ for _ in ()).throw(MemoryError("none left")))
        scheduler.step()
    assert first.pieces[-1][2:] == ("error", "the model failed: MemoryError")
    while scheduler.step():
        pass
    assert second.outcome == by_itself(model, order(PROMPT[:5]))


def test_what_does_not_fit_is_refused_before_it_is_begun(model):
    scheduler = Scheduler(Steps(model, 1, 64, 16))
    for prompt, words in (((), "1 is needed"), (PROMPT[:61], "65 tokens"), ((5, 97), "0 to 96"), ((5, -1), "0 to 96")):
        with pytest.raises(InvalidInput, match=words):
            scheduler.submit(Received(order(prompt)).answer)
    run_to_end(scheduler, [Received(order(PROMPT[:60])).answer])


def test_whole_prompts_one_in_each_step(tiny):
    execution = execution_of(tiny("gpt2"), slots=3)
    assert isinstance(execution, Alone)
    scheduler = Scheduler(execution)
    received = [Received(order(PROMPT[:9], most=9)) for _ in range(3)]
    for one in received:
        scheduler.submit(one.answer)
    counts = []
    for _ in range(4):
        scheduler.step()
        counts.append(scheduler.tokens)
    assert counts == [9, 10, 11, 3]
