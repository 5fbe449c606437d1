"""Long texts that are made: as long as asked for, answerable from the text alone, the same every time."""

import random
import re

import pytest

from sparity.errors import InvalidInput
from sparity.measure.tasks.long_context import KINDS, OFTEN, SELDOM, generated

LENGTH = 150


def encode(text):
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def items(kind):
    return generated(kind, encode, LENGTH, 12, seed=3)


def test_each_fills_the_context_and_no_more(kind, items):
    for index, item in enumerate(items):
        longest = max(len(encode(f"{item.text} {choice}")) for choice in item.choices)
        assert LENGTH - 60 < longest <= LENGTH, (kind, index)


def test_the_same_seed_gives_the_same_items_and_another_one_others(kind, items):
    assert generated(kind, encode, LENGTH, 12, seed=3) == items
    assert generated(kind, encode, LENGTH, 12, seed=4) != items
    random.seed(1)
    assert generated(kind, encode, LENGTH, 12, seed=3)[5] == items[5]


def test_choices_differ_and_the_right_one_stands_anywhere(items):
    assert all(len(set(item.choices)) == 4 for item in items)
    assert len({item.gold for item in items}) > 1


def answer_of(kind, item):
    """The answer found by reading the text, as a person would."""
    if kind == "passkey":
        return re.search(r"The pass key is (\d+)\.", item.context)[1]
    if kind == "several_keys":
        name = re.search(r"of the (\w+) door\?", item.question)[1]
        return re.search(rf"The key of the {name} door is (\d+)\.", item.context)[1]
    if kind == "variable_tracking":
        values = {}
        for name, value in re.findall(r"VAR (\w) = (?:VAR )?(\w+)\.", item.context):
            assert not value.isalpha() or value in values, "a variable is used before it has a value"
            values[name] = values.get(value, value)
        return values[re.search(r"does VAR (\w) hold", item.question)[1]]
    words = re.findall(r"\w+", item.context)[1:]
    counts = {word: words.count(word) for word in set(words)}
    most = max(counts, key=counts.get)
    assert {counts[word] * OFTEN // SELDOM for word in counts if word != most} == {counts[most]}
    return most


def test_the_text_holds_the_answer(kind, items):
    for item in items:
        assert item.choices[item.gold] == answer_of(kind, item)


def test_pass_keys_lie_at_every_depth():
    places = [item.context.index("The pass key") for item in generated("passkey", encode, LENGTH, 5, seed=0)]
    assert places == sorted(places)
    assert places[0] == 0


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InvalidInput, match="too short"):
        generated("passkey", encode, 10, 1, seed=0)
    with pytest.raises(InvalidInput, match="one of passkey"):
        generated("needles", encode, 100, 1, seed=0)
