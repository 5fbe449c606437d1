"""Recall: contexts that ask for what they said, and what a model still knows when its cache was compressed."""

import copy

import pytest
import torch

import sparity
from sparity.errors import InvalidInput
from sparity.quality.recall import Context, Question, bytes_of, recall
from sparity.quality.recall_suites import common_words, copies, pass_keys, variables

WORDS = {}


def encode(text):
    """Every word a number of its own."""
    return [WORDS.setdefault(word, len(WORDS)) for word in text.replace(".", " .").replace(",", " ,").split()]


def read(tokens):
    words = list(WORDS)
    return " ".join(words[token] for token in tokens)


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def test_copies_ask_for_what_followed():
    for context in copies(50, length=30, asked=4, answer=3, count=20):
        (question,) = context.questions
        end = 30 - question.distance
        assert len(context.tokens) == 30
        assert context.tokens[end - 7 : end] == question.asked + question.answer
    assert copies(50, length=30) == copies(50, length=30)
    with pytest.raises(InvalidInput, match="holds no 8 and 4"):
        copies(50, length=11)


def test_pass_keys_are_said_once_and_asked_for():
    filler = encode("one two three four five six seven eight nine ten " * 10)
    for context in pass_keys(encode, filler, length=60, keys=3, count=5):
        assert len(context.tokens) == 60
        assert len(context.questions) == 3
        for question in context.questions:
            name = read(question.asked).split()[-2]
            assert read(question.asked) == f"What is the pass key of {name}? The pass key of {name} is"
            said = read(context.tokens[: 60 - question.distance])
            assert said.endswith(f"The pass key of {name} is {read(question.answer)} .")
    for options, words in (({"keys": 15}, "there are 14 names"), ({"length": 5}, "needs 8 for what it says")):
        with pytest.raises(InvalidInput, match=words):
            pass_keys(encode, filler, **{"length": 60, **options})
    with pytest.raises(InvalidInput, match="which has 3"):
        pass_keys(encode, filler[:3], length=60)


def test_variables_hand_a_number_on_in_order():
    filler = encode("one two three four five six seven eight nine ten " * 10)
    for context in variables(encode, filler, length=60, steps=2, count=5):
        (question,) = context.questions
        text, last = read(context.tokens), read(question.asked).split()[-2]
        middle = text.split(f"Variable {last} = variable ")[1].split()[0]
        first = text.split(f"Variable {middle} = variable ")[1].split()[0]
        assert f"Variable {first} = {read(question.answer)} ." in text
        assert read(context.tokens[: 60 - question.distance]).endswith(f"{read(question.answer)} .")
        places = [text.index(f"Variable {name} =") for name in (first, middle, last)]
        assert places == sorted(places)


def test_the_common_word_is_the_most_frequent():
    for context in common_words(encode, length=200, often=6, count=5):
        (question,) = context.questions
        words = [word for word in read(context.tokens).split() if word not in ("Words:", ",")]
        assert max(set(words), key=words.count) == read(question.answer)
        assert context.tokens[len(context.tokens) - question.distance - 2] == question.answer[0]


def test_answers_are_scored_as_in_one_call(model):
    contexts = copies(90, length=30, asked=4, answer=3, count=4)
    found = recall(model, contexts)
    for context, right, loss in zip(contexts, found.right, found.losses, strict=True):
        (question,) = context.questions
        ids = torch.tensor([(*context.tokens, *question.asked, *question.answer)])
        with torch.no_grad():
            logits = model(ids).logits[0, 33:36]
        answer = torch.tensor(question.answer)
        assert right == bool((logits.argmax(-1) == answer).all())
        assert loss == pytest.approx(float(-logits.log_softmax(-1)[range(3), answer].mean()), abs=1e-5)
    aware = recall(model, contexts, query_aware=True)
    assert aware.losses == pytest.approx(found.losses, abs=1e-5)
    assert found.nbytes == 3 * 2 * 2 * 30 * 8 * 4  # layers, keys and values, heads, tokens, width, bytes


def test_questions_are_put_to_what_the_policy_left(model):
    contexts = copies(90, length=40, asked=4, answer=3, count=3)
    whole = recall(model, contexts)
    with sparity.cache(model, "streaming_llm", 1.0):
        assert recall(model, contexts).losses == pytest.approx(whole.losses, abs=1e-6)
    with sparity.cache(model, "drop_all"):
        found = recall(model, contexts)
        assert found.losses != pytest.approx(whole.losses, abs=1e-3)
        with torch.no_grad():
            past = model(torch.tensor([contexts[0].tokens])).past_key_values
        assert found.nbytes == bytes_of(past) == sum(layer.nbytes for layer in past.layers)
        twice = Context(contexts[0].tokens, contexts[0].questions * 2)
        assert len(set(recall(model, [twice]).losses)) == 1  # a question leaves no trace


def test_shares_by_distance():
    found = recall_of((True, False, True, True), (5, 15, 15, 40))
    assert found.share == 0.75
    assert found.loss == 2.5
    assert found.by_distance([10, 20, 30, 50]) == [1.0, 0.5, None, 1.0]


def recall_of(right, distances):
    from sparity.quality.recall import Recalled

    return Recalled(right, (1.0, 2.0, 3.0, 4.0), distances, 0.0)


def test_nothing_to_ask_is_refused(model):
    for contexts, words in (
        ([], "at least one question"),
        ([Context((1, 2), ())], "at least one question"),
        ([Context((1, 2), (Question((), (1,), 1),))], "every question has tokens"),
        ([Context((1, 2), (Question((1,), (), 1),))], "every question has tokens"),
    ):
        with pytest.raises(InvalidInput, match=words):
            recall(model, contexts)
