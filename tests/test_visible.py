"""Text that is fit to be shown: nothing in it acts, nothing in it is endless, what was harmless stays."""

import logging
import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparity.errors import CorruptFile, InvalidInput, SparityError, suggestion, wrong_input
from sparity.visible import LONGEST_MESSAGE, LONGEST_WORD, escape, harmless, logger, one_line, visible

ANY_TEXT = st.text(st.characters(categories=None, exclude_categories=[]), max_size=400)
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def acting(text, allowed=""):
    """The characters of a text that a terminal or a page would act on."""
    kinds = {"Cc", "Cs", "Zl", "Zp"}
    return [each for each in text if each not in allowed and (unicodedata.category(each) in kinds or each in BIDI)]


@given(ANY_TEXT)
def test_nothing_acts_and_nothing_is_lost_of_what_is_harmless(text):
    assert acting(visible(text), "\n\t") == acting(harmless(text), "\n\t") == acting(one_line(text)) == []
    assert acting(escape(text), "\n\t") == []
    if not acting(text) and text.isprintable() and all(len(word) <= LONGEST_WORD for word in text.split()):
        assert one_line(text) == visible(text) == text


@given(ANY_TEXT, st.integers(1, 300))
def test_a_message_is_short_and_says_the_same_again(text, times):
    said = one_line(text * times)
    assert len(said) <= LONGEST_MESSAGE
    assert one_line(said) == said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;pwned\x07\x1b[2J", r"\x1b]0;pwned\x07\x1b[2J"),
        ("a\x7fb\x9bc", r"a\x7fb\x9bc"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("half \ud800 pair", r"half \ud800 pair"),
        ("a\r\nerror: false", "a error: false"),
        ("na\u00efve \u4e2d\u6587 \U0001f600 a\u200db", "na\u00efve \u4e2d\u6587 \U0001f600 a\u200db"),
    ],
)
def test_escapes(text, shown):
    assert one_line(text) == shown
    assert str(InvalidInput(text)) == shown


def test_line_ends_stay_where_several_lines_are_shown():
    assert visible("a\n\tb\x1b") == "a\n\tb\\x1b"


@pytest.mark.parametrize("length", [5_100, 100_100, 5_000_000])
def test_a_long_word_keeps_its_ends_and_the_advice_behind_it(length):
    said = str(CorruptFile(f"{'x' * length} is damaged: fetch it again"))
    assert len(said) <= LONGEST_MESSAGE
    assert said.startswith("xxx")
    assert said.endswith("is damaged: fetch it again")
    assert "characters]..." in said


def test_errors_of_every_kind_keep_their_class_when_they_are_copied():
    for kind in (SparityError, *SparityError.__subclasses__()):
        copied = pickle.loads(pickle.dumps(kind("a\x1bb")))
        assert (type(copied), str(copied)) == (kind, r"a\x1bb")


def test_html_is_escaped_too():
    assert escape('<b>\x1b"') == "&lt;b&gt;\\x1b&quot;"


def test_logs(caplog):
    with caplog.at_level(logging.WARNING):
        logger("sparity.of.a.test").warning("%s is odd", "\x1b[2J\u202e")
    assert caplog.messages == [r"\x1b[2J\u202e is odd"]


def test_modules_take_their_loggers_here():
    from test_directions import SOURCE

    found = [path.name for path in SOURCE.rglob("*.py") if "logging.getLogger(" in path.read_text()]
    assert found == ["visible.py"]


def test_pages_and_charts_take_their_escapes_here():
    from test_directions import SOURCE

    assert [path.name for path in SOURCE.rglob("*.py") if "from html import" in path.read_text()] == []


def test_a_suggestion_looks_at_short_names_and_not_at_all_of_many():
    assert suggestion("wnda", ["wanda"]) == '; did you mean "wanda"?'
    assert suggestion("x" * 100_000, ["x" * 99_999]) == ""
    assert suggestion("text", (str(number) for number in range(10**7))) == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "needs more memory than there is"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "needs more memory than there is"),
        (RecursionError("maximum depth"), "nested too deeply"),
        (ValueError("embedded null byte"), r"the input cannot be used \(ValueError\): embedded null byte"),
        (OverflowError(), r"the input cannot be used \(OverflowError\): OverflowError"),
        (FileNotFoundError(2, "No such file", "x"), "the input cannot be used"),
        ("a".encode, None),
    ],
)
def test_the_boundary_of_an_entry_point(error, words):
    @wrong_input()
    def entry():
        if isinstance(error, Exception):
            raise error
        return error()

    if words is None:
        assert entry() == b"a"
        return
    with pytest.raises(InvalidInput, match=words):
        entry()


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), RuntimeError("x"), BrokenPipeError(32, "pipe")])
def test_faults_of_the_program_pass_the_boundary(error):
    with pytest.raises(type(error)), wrong_input():
        raise error
