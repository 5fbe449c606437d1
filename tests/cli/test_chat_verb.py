"""`sparity chat`: turns, two models side by side, and what goes wrong."""

import pytest
from typer.testing import CliRunner

from sparity.cli.main import app
from sparity.serve.conversation import Conversation
from sparity.serve.sampling import Sampling
from sparity.serve.served_model import open_model

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
GREEDY = Sampling(temperature=0)


@pytest.fixture
def talk(tmp_path):
    """A function that talks to `zoo:llama` and gives what is printed."""
    (tmp_path / "template").write_text(TEMPLATE)

    def run(lines, *arguments):
        command = ["chat", "zoo:llama", "--chat-template", tmp_path / "template", "--tokens", 6, *arguments]
        done = CliRunner().invoke(app, [*map(str, command)], input=lines)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return run


@pytest.fixture(scope="module")
def served():
    return open_model("zoo:llama", slots=1, context=256, template=TEMPLATE, prefix_bytes=10**7)


def test_turns_follow_each_other(served, talk):
    conversation = Conversation(served, "Be brief", GREEDY, 6)
    first = conversation.say("Hello there", lambda piece: None)
    pieces = []
    second = conversation.say("And now something longer " * 14, pieces.append)
    assert "".join(pieces) == second.text
    assert (first.tokens, second.tokens) == (6, 6)
    third = conversation.say("More", lambda piece: None)
    assert third.reused >= 64
    alone = Conversation(served, "Be brief", GREEDY, 6)
    asked = ["Hello there", "And now something longer " * 14, "More"]
    assert [alone.say(text, lambda piece: None).text for text in asked] == [first.text, second.text, third.text]
    done = talk("Hello there\n\n/reset\nHello there\n/quit\nnever\n", "--system", "Be brief")
    assert done.stdout == f"{first.text}\n{first.text}\n"


def test_two_models_side_by_side(talk):
    one = talk("Hello\n").stdout
    both = talk("Hello\n", "--beside", "zoo:relu", "--stats")
    lines = both.stdout.splitlines()
    assert both.exit_code == 0
    assert lines[0] == f"zoo:llama: {one.splitlines()[0]}"
    assert any(line.startswith("zoo:relu: ") for line in lines[1:])
    assert both.stderr.count("6 tokens, ") == 2


def test_a_conversation_that_became_too_long_goes_on_after_a_reset(talk):
    done = talk("one two three four five six\nb\n/reset\na\n", "--context", 24)
    assert "and zoo:llama takes 24: /reset begins a new one" in done.stderr
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) >= 3


def test_a_model_that_was_not_trained_to_chat():
    done = CliRunner().invoke(app, ["chat", "zoo:llama"], input="a\n")
    assert done.exit_code == 1
    assert "zoo:llama has no chat template: give --chat-template" in done.stderr


def test_an_interrupt_ends_the_answer_only(served, monkeypatch):
    conversation, step, calls = Conversation(served, None, GREEDY, 50), served.scheduler.step, []

    def interrupted():
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(served.scheduler, "step", interrupted)
    turn = conversation.say("Hello", lambda piece: None)
    assert turn.tokens == 3
    assert served.scheduler.running == {}
    assert conversation.say("Go on", lambda piece: None).tokens > 3
