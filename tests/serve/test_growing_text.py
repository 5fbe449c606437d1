"""Text that comes in pieces: characters across tokens, stop strings across pieces, what may go out when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from served import Letters, Received
from sparity.serve.growing_text import GrowingText, Stops
from sparity.serve.sampling import Sampling
from sparity.serve.sequence import Order


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12))
def test_pieces_are_whole_characters_and_make_up_the_text(text):
    growing = GrowingText(Bytes())
    pieces = [growing.add([byte]) for byte in text.encode()] + [growing.rest()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


def test_a_character_that_stays_unfinished():
    growing = GrowingText(Bytes())
    assert [growing.add([byte]) for byte in "aé".encode()[:2]] == ["a", ""]
    assert (growing.rest(), growing.rest()) == ("\ufffd", "")


@pytest.mark.parametrize(
    ("strings", "kept", "text", "known", "end"),
    [
        (("cd",), False, "abcde", 0, 2),
        (("cd",), True, "abcde", 0, 4),
        (("cd", "bc"), False, "abcde", 0, 1),
        (("cd",), False, "abcde", 3, 2),  # across what is known and what is new
        (("ab",), False, "abcde", 2, None),  # it was passed over before
        ((), False, "abcde", 0, None),
    ],
)
def test_where_a_stop_string_ends_a_text(strings, kept, text, known, end):
    assert Stops(strings, kept).end(text, known) == end


@pytest.mark.parametrize(
    ("strings", "text", "safe"),
    [(("xyz",), "abx", 2), (("xyz",), "abxy", 2), (("xyz",), "abxx", 3), (("xyz", "bxxq"), "abxx", 1), ((), "abx", 3)],
)
def test_what_a_stop_string_may_still_take_back(strings, text, safe):
    assert Stops(strings).safe(text) == safe


def pieces_of(text, *stops, kept=False, least=0, most=99):
    """What comes of an answer whose tokens are the characters of `text`."""
    received = Received(
        Order(prompt=(1,), sampling=Sampling(temperature=0), stop=stops, stop_kept=kept, least=least, most=most)
    )
    answer = received.answer
    answer._chooser.choose = lambda logits, banned: ord(text[answer.made]) - 32
    for _ in text:
        if answer.finish is None:
            answer.computed = len(answer.ids)
            answer.see(0, [None])
    return received.pieces


def told(pieces):
    return [
        (piece.text, "".join(Letters().decode([token.id]) for token in piece.tokens), piece.finish) for piece in pieces
    ]


def test_an_answer_with_a_stop_string():
    assert told(pieces_of("abSTOcd", "STOP", most=7)) == [
        ("a", "a", None),
        ("b", "b", None),
        ("STOc", "STOc", None),
        ("d", "d", "length"),
    ]
    assert told(pieces_of("abSTOPcd", "STOP")) == [("a", "a", None), ("b", "b", None), ("", "", "stop")]
    assert told(pieces_of("abSTOPcd", "STOP", kept=True))[-1] == ("STOP", "STOP", "stop")
    assert told(pieces_of("SSTOPcd", "STOP")) == [("S", "S", None), ("", "", "stop")]
    assert told(pieces_of("Sabcd", "S", "cd", least=3))[-1] == ("", "", "stop")
    assert told(pieces_of("ab", "b", most=2)) == [("a", "a", None), ("", "", "stop")]
    assert told(pieces_of("abST", "STOP", most=4))[-1] == ("ST", "ST", "length")


def test_the_model_s_own_end():
    assert told(pieces_of("ab" + chr(34), "x"))[-1] == ("", "", "stop")
    assert "".join(piece.text for piece in pieces_of('ab"c', "x")) == "ab"
