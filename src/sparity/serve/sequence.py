"""One answer: what was asked for, how far it is, and what has come of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparity.serve.growing_text import GrowingText, Stops
from sparity.serve.sampling import Chooser, Sampling

Finish = Literal["stop", "length", "timeout", "error"]


class Token(NamedTuple):
    """One token of a prompt or an answer.

    Attributes:
        id: its number.
        offset: characters of the answer before it.
        logprob: the logarithm of its probability before temperature and penalties; None where it was not asked for.
        top: the likeliest tokens there, with theirs.
    """

    id: int
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """A part of an answer, in the order in which parts come; the last one says why there are no more.

    Attributes:
        text: that is whole, and that no stop string takes back.
        tokens: that it comes from.
        finish: why the answer ends: by itself or a stop string, at its most tokens, for want of time, or by a fault.
        message: what the fault was.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: Finish | None = None
    message: str | None = None


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        prompt: tokens, at least one.
        sampling: how the others are chosen.
        most: tokens of the answer at most, from 0 on.
        least: before so many no token ends it.
        stop: strings that end it, and are not part of it.
        stop_kept: whether they are part of it all the same.
        stop_ids: tokens that end it, besides the model's own.
        ignore_end: the model's own end nothing.
        logprobs: how many of the likeliest tokens are told with each token's own logprob; None = nothing is told.
        prompt_logprobs: the same of the prompt.
        scored: the prompt is a text that is scored; see `Part`.
        forced: tokens behind the prompt that are read instead of chosen; with `observe` only.
        deadline: the time, by `time.monotonic`, at which it must be done.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    most: int = 16
    least: int = 0
    stop: tuple[str, ...] = ()
    stop_kept: bool = False
    stop_ids: frozenset[int] = frozenset()
    ignore_end: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    scored: bool = False
    forced: tuple[int, ...] = ()
    deadline: float | None = None


class Answer:
    """An order while it is worked on.

    Args:
        order: what is asked for.
        tokenizer: which gives the text.
        ends: tokens by which the model ends a text.
        emit: is called with each piece.
        observe: is called with the place of a token and the logits `[some, vocabulary]` behind it and those after it,
            from the last one of the prompt on.

    Attributes:
        ids: prompt and answer.
        computed: how many of them are in the cache.
        reused: how many of those came from other texts.
        prompt_tokens: what the prompt's logprobs are, as far as they are known.
        finish: why it ended; None while it goes on.
        asked: when it was asked for, by `time.monotonic`; also when it was `taken` up, its `first` and `last` token.
        corrupted: whether it ended by logits that are no numbers.
    """

    def __init__(
        self,
        order: Order,
        tokenizer: Any,
        ends: frozenset[int],
        emit: Callable[[Piece], object],
        observe: Callable[[int, Tensor], object] | None = None,
    ) -> None:
        self.order, self.emit, self.observe = order, emit, observe
        self.ids = [*order.prompt, *order.forced]
        self.computed = self.reused = 0
        self.slot: int | None = None
        self.finish: Finish | None = None
        self.corrupted = False
        self.asked, self.taken, self.first, self.last = time.monotonic(), 0.0, 0.0, 0.0
        own = frozenset() if order.ignore_end else ends
        self._ends = own | order.stop_ids
        self._chooser = Chooser(order.sampling, order.prompt)
        self._growing, self._stops = GrowingText(tokenizer), Stops(order.stop, order.stop_kept)
        self._text, self._told = "", 0  # all of it, and how many characters went out
        self._tokens: list[Token] = []  # that did not go out
        self.prompt_tokens: list[Token] = []
        if order.prompt_logprobs is not None:
            self.prompt_tokens.append(Token(order.prompt[0], 0, None, ()))

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.order.prompt) - len(self.order.forced)

    @property
    def wanted_from(self) -> int | None:
        """From which token on logits are wanted, besides those of the last one."""
        if self.order.prompt_logprobs is not None:
            return 0
        return None if self.observe is None else len(self.order.prompt) - 1

    def see(self, start: int, logits: Tensor) -> None:
        """Take up the logits `[some, vocabulary]` behind the tokens from `start` on; they may lead to a new one."""
        if self.observe is not None:
            self.observe(start, logits)
        wanted = self.order.prompt_logprobs
        if wanted is not None:
            for at, row in enumerate(logits, start + 1):
                if len(self.prompt_tokens) <= at < len(self.order.prompt):
                    self.prompt_tokens.append(_told(self.order.prompt[at], 0, row, wanted))
        if self.computed == len(self.ids) and self.finish is None:
            self._go_on(logits[-1])

    def end(self, finish: Finish, message: str | None = None) -> None:
        """End it, and tell what was held back."""
        self.finish = finish
        if finish in ("stop", "length"):
            known = len(self._text)
            self._text += self._growing.rest()
            cut = self._stops.end(self._text, known) if self._text[known:] else None
            if cut is not None:
                self._cut(cut)
        self._tell(len(self._text), finish, message)

    def _go_on(self, logits: Tensor) -> None:
        if self.order.most == 0 or self.order.forced:
            self.end("length")
            return
        banned = self._ends if self.made < self.order.least else ()
        chosen = self._chooser.choose(logits, banned)
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.ids.append(chosen)
        offset = len(self._text)
        wanted = self.order.logprobs
        self._tokens.append(
            Token(chosen, offset, None, ()) if wanted is None else _told(chosen, offset, logits, wanted)
        )
        self._text += self._growing.add([chosen])
        cut = self._stops.end(self._text, offset) if self.made >= self.order.least else None
        if cut is not None:
            self._cut(cut)
            self.finish = "stop"
            self._tell(len(self._text), "stop")
        elif chosen in self._ends:
            self.end("stop")
        elif self.made >= self.order.most:
            self.end("length")
        else:
            self._tell(self._stops.safe(self._text))

    def _cut(self, end: int) -> None:
        self._text = self._text[:end]
        self._tokens = [token for token in self._tokens if token.offset < end]

    def _tell(self, end: int, finish: Finish | None = None, message: str | None = None) -> None:
        """Let the text up to `end` go out, and the tokens that begin before."""
        out = tuple(token for token in self._tokens if token.offset < end or finish)
        end = max(end, self._told)
        if end > self._told or finish:
            piece = Piece(self._text[self._told : end], out, finish, message)
            self._tokens, self._told = self._tokens[len(out) :], end
            self.emit(piece)


def _told(token: int, offset: int, logits: Tensor, most: int) -> Token:
    """A token with its logprob, and with those of the `most` likeliest ones."""
    shares = torch.log_softmax(logits, 0)
    values, ids = shares.topk(min(most, len(shares)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, offset, float(shares[token]), top)


def texts_of(pieces: Sequence[Piece]) -> str:
    """The text of an answer's pieces."""
    return "".join(piece.text for piece in pieces)
