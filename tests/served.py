"""Orders of a scheduler in tests, and what comes of them."""

from sparity.serve.execution.alone import Alone
from sparity.serve.execution.steps import Steps, declines
from sparity.serve.scheduler import Scheduler, run_to_end
from sparity.serve.sequence import Answer, texts_of

ENDS = frozenset({2})


class Letters:
    """A tokenizer of 97 characters; 2 is special."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(32 + token) for token in ids if token != 2)


class Received:
    """An answer and its pieces."""

    def __init__(self, order, tokenizer=None, ends=ENDS):
        self.pieces = []
        self.answer = Answer(order, tokenizer or Letters(), ends, self.pieces.append)

    @property
    def outcome(self):
        """All that can be told of it, numbers by their bits."""
        tokens = [token for piece in self.pieces for token in piece.tokens]
        finish = self.pieces[-1].finish if self.pieces else None
        return self.answer.ids, texts_of(self.pieces), tokens, self.answer.prompt_tokens, finish


def execution_of(model, slots=1, most=1, context=64):
    reason = declines(model)
    return Steps(model, slots, context, most) if reason is None else Alone(model, slots, context, reason)


def by_itself(model, order, **options):
    """The outcome of an order that nothing else comes with, token by token where that is possible."""
    received = Received(order)
    run_to_end(Scheduler(execution_of(model, **options)), [received.answer])
    return received.outcome
