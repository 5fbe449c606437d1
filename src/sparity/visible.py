"""Text from files and arguments, made fit to be shown: nothing in it acts on a terminal, and it is not endless.

Every message, log line, table and page goes through here: errors when they are made, the rest where it is printed.
"""

import html
import logging
import re

LONGEST_WORD = 300  # characters without a space; a name of a file has at most 255
LONGEST_MESSAGE = 2000
ENDS = 80  # characters that stay at the end of what is cut: there a message says what to do

# C0, DEL and C1; bidirectional marks, overrides, isolates; line separators; half surrogate pairs; invisible tags
_ACTING = (
    r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e0fff"
)
_ANY = re.compile(f"[{_ACTING}]")
_BUT_LAYOUT = re.compile(f"(?![\n\t])[{_ACTING}]")
_LINE_ENDS = re.compile(r"[\r\n]+")
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def visible(text: str) -> str:
    """The text with line ends and tabs as they are, every other acting character escaped, and long words cut."""
    return _cut_words(_BUT_LAYOUT.sub(_escaped, text))


def harmless(text: str) -> str:
    """The text with every acting character but line ends and tabs escaped, at its full length."""
    return _BUT_LAYOUT.sub(_escaped, text)


def one_line(text: str) -> str:
    """The text as a message shows it: line ends as spaces, acting characters escaped, long words and the whole cut."""
    if len(text) > 4 * LONGEST_MESSAGE:  # before anything is searched: escapes are no longer than 10 characters
        text = _cut(text, 4 * LONGEST_MESSAGE, LONGEST_MESSAGE)
    return _cut(_cut_words(_ANY.sub(_escaped, _LINE_ENDS.sub(" ", text))), LONGEST_MESSAGE, 4 * ENDS)


def escape(text: str, quote: bool = True) -> str:
    """The text for HTML, SVG and Markdown: `visible`, with what these languages act on escaped too."""
    return html.escape(visible(text), quote)


def logger(name: str) -> logging.Logger:
    """The logger of that name; what it logs is visible text."""
    found = logging.getLogger(name)
    if _make_visible not in found.filters:
        found.addFilter(_make_visible)
    return found


def _make_visible(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(record.getMessage()), ()
    return True


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def _cut_words(text: str) -> str:
    return _LONG_WORD.sub(lambda match: _cut(match[0], LONGEST_WORD, ENDS), text)


def _cut(text: str, most: int, end: int) -> str:
    """The text, or its beginning and its last `end` characters with the number of those left out between."""
    if len(text) <= most:
        return text
    room = most - end - 40  # for what is said of the rest
    return f"{text[:room]}...[{len(text) - room - end:,} characters]...{text[-end:]}"
