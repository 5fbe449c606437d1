"""What a model gives to an answer: in one pass, in steps from its cache, and with policies that evict."""

import copy
import math

import pytest
import torch

import sparity
from sparity.errors import InvalidInput
from sparity.measure.tasks.reading import Asked, Reader, judged

DRAWN = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()
CONTEXT, OTHER = tuple(DRAWN[:20]), tuple(DRAWN[20:39])
QUESTIONS = [
    Asked(CONTEXT, (5, 6, 7)),
    Asked(CONTEXT, (8,)),
    Asked(CONTEXT, (9, 5)),
    Asked(OTHER, (5, 6, 7)),
    Asked(OTHER[:4], (7, 7)),
]
FREE = {"sinks": 0, "recent": 0}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


@torch.no_grad()
def plainly(model, one):
    """The definition: the sum of the logarithms of each token's probability after all before it."""
    ids = torch.tensor([[*one.context, *one.answer]])
    each = model(ids).logits[0].double().log_softmax(-1)
    places = range(len(one.context), ids.shape[1])
    greedy = all(int(each[place - 1].argmax()) == int(ids[0, place]) for place in places)
    return sum(float(each[place - 1, ids[0, place]]) for place in places), greedy


def logprobs(found):
    return [one.logprob for one in found]


def test_logits_are_judged_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]], dtype=torch.bfloat16)
    found = judged(logits, [1, 1])
    three, four = (float(logits.float()[place].max().exp()) for place in (0, 1))  # as bfloat16 holds them
    assert found.logprob == pytest.approx(math.log(three / (1 + three)) + math.log(1 / (1 + four)), rel=1e-6)
    assert found.greedy is False
    assert judged(logits, [1, 0]).greedy is True


@pytest.mark.parametrize("way", ["whole", "steps"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_answer_has_its_log_probability(model, way, batch):
    found = Reader(model, batch, way=way).score(QUESTIONS)
    for one, scored in zip(QUESTIONS, found, strict=True):
        logprob, greedy = plainly(model, one)
        assert scored.logprob == pytest.approx(logprob, abs=1e-4)
        assert scored.greedy == greedy


@pytest.mark.parametrize("way", ["whole", "steps"])
def test_the_order_of_questions_changes_no_bit(model, way):
    forward = Reader(model, 2, way=way).score(QUESTIONS)
    assert Reader(model, 2, way=way).score(QUESTIONS[::-1])[::-1] == forward
    assert Reader(model, 2, way=way).score([QUESTIONS[0], *QUESTIONS])[1:] == forward


def test_what_greedy_decoding_writes_is_greedy(model):
    ids = torch.tensor([CONTEXT])
    written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 20:].tolist()
    for way in ("whole", "steps"):
        assert Reader(model, way=way).score([Asked(CONTEXT, tuple(written))])[0].greedy


def test_keep_all_is_dense_bit_for_bit(model):
    dense = Reader(model, way="steps").score(QUESTIONS)
    with sparity.cache(model, "keep_all", keep=0.5):
        reader = Reader(model)
        assert reader.way == "steps"  # of itself
        assert reader.score(QUESTIONS) == dense


def test_drop_all_leaves_nothing_of_the_context_but_its_last_token(model):
    """Two contexts of one length and one last token: to a model that keeps nothing of them they are the same."""
    other = (*CONTEXT[::-1][:-1], CONTEXT[-1])
    answers = [(5, 6), (7,), (9, 8, 3)]
    pairs = [Asked(context, answer) for answer in answers for context in (CONTEXT, other)]
    dense = logprobs(Reader(model, way="steps").score(pairs))
    with sparity.cache(model, "drop_all", keep=0.5, **FREE):
        blind = logprobs(Reader(model).score(pairs))
    assert blind[::2] == blind[1::2]
    assert dense[0] != dense[1]
    assert blind[0] != dense[0]


def test_a_policy_shows_in_the_first_token_too(model):
    with sparity.cache(model, "knorm", keep=0.3, sinks=1, recent=1):
        evicted = Reader(model).score([Asked(CONTEXT, (5,))])
    assert evicted != Reader(model, way="steps").score([Asked(CONTEXT, (5,))])


def test_a_policy_that_chooses_for_each_query_shows(model):
    """Quest drops nothing: it would not show in a call of several tokens."""
    with sparity.cache(model, {"quest": {"page": 2, "pages": 1, "dense": 0}}, keep=0.2, **FREE):
        chosen = logprobs(Reader(model).score(QUESTIONS[:1]))
    assert chosen != logprobs(Reader(model, way="steps").score(QUESTIONS[:1]))


def test_what_is_held_first_is_all_that_is_evicted_from(model):
    """Asked later: only the text is read before the eviction, the question is read from what is left of it."""
    later = Asked(CONTEXT, (5, 6), held=12)
    dense = Reader(model, way="steps").score([later])
    assert logprobs(dense)[0] == pytest.approx(plainly(model, later)[0], abs=1e-4)
    with sparity.cache(model, "snapkv", keep=6, sinks=0, recent=0, window=2):
        asked = [Asked(CONTEXT, (5, 6)), later]
        together, apart = Reader(model).score(asked)
        past = Reader(model).read_in_steps(CONTEXT[:-1], 12)
    assert together != apart
    assert past.layers[0].store.lengths.tolist() == [6 + 7] * past.layers[0].store.lengths.numel()


def test_a_context_that_is_too_long_loses_its_start_and_is_counted(model):
    reader = Reader(model, length=10, way="whole")
    (found,) = reader.score([Asked(CONTEXT, (5, 6))])
    assert found == Reader(model, way="whole").score([Asked(CONTEXT[-9:], (5, 6))])[0]
    assert reader.cut == 1
    steps = Reader(model, length=10, way="steps")
    assert steps.score([Asked(CONTEXT, (5, 6), held=15)]) == Reader(model, way="steps").score(
        [Asked(CONTEXT[-9:], (5, 6), held=4)]
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked((), (1,)), "without a context"),
        (Asked((1,), ()), "without an answer"),
        (Asked((1,), tuple(range(3, 24))), "does not fit"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, asked, words):
    with pytest.raises(InvalidInput, match=words):
        Reader(model, length=16, way="whole").score([asked])


def test_one_pass_with_a_policy_is_refused(model):
    with sparity.cache(model, "knorm", keep=0.5), pytest.raises(InvalidInput, match="in steps"):
        Reader(model, way="whole")
    with pytest.raises(InvalidInput, match="at least one"):
        Reader(model, batch=0)
