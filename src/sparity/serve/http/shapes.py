"""Answers in the shapes that OpenAI's clients read."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from sparity.serve.growing_text import GrowingText
from sparity.serve.sequence import Answer, Piece, Token
from sparity.serve.served_model import ServedModel

LOWEST = -9999.0  # JSON has no infinity


class Shape:
    """The shape of one request's answers, as text.

    Args:
        served: the model.
        ids: whether tokens are shown by their numbers.
        logprobs: whether they are shown at all.
        echo: of each choice, the prompt that goes before it, if any.
    """

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, served: ServedModel, ids: bool = False, logprobs: bool = False, echo: Sequence[str] | None = None
    ) -> None:
        self._served, self._ids, self._logprobs, self._echo = served, ids, logprobs, echo
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(16)}",
            "object": self.whole_kind,
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    def whole(self, answers: Sequence[Answer], pieces: Sequence[Sequence[Piece]], prompts: int) -> dict[str, Any]:
        """All of it; `prompts` are those of the request, each of which counts once."""
        choices = []
        for index, (answer, own) in enumerate(zip(answers, pieces, strict=True)):
            text, tokens = "".join(piece.text for piece in own), [token for piece in own for token in piece.tokens]
            choices.append(self._choice(index, *self._echoed(index, answer, text, tokens), own[-1].finish))
        return {**self._head, "choices": choices, "usage": usage(answers, prompts)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What comes before a choice's first piece."""
        return []

    def chunk(self, index: int, answer: Answer, piece: Piece, first: bool) -> dict[str, Any]:
        """One piece of a choice."""
        text, tokens, added = piece.text, list(piece.tokens), 0
        if first:
            text, tokens, added = self._echoed(index, answer, text, tokens)
        elif self._echo is not None:
            added = len(self._echo[index])
        return self._chunk([self._part(index, text, tokens, added, piece.finish)])

    def closing(self, answers: Sequence[Answer], prompts: int) -> dict[str, Any]:
        """What a stream ends with that asked for its usage."""
        return {**self._chunk([]), "usage": usage(answers, prompts)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _echoed(self, index: int, answer: Answer, text: str, tokens: list[Token]) -> tuple[str, list[Token], int]:
        """Text and tokens with the prompt before them, and how many characters the offsets of the answer's grow by."""
        if self._echo is None:
            return text, tokens, 0
        growing, at, before = GrowingText(self._served.tokenizer), 0, []
        for token in answer.prompt_tokens:
            before.append(token._replace(offset=at))
            at += len(growing.add([token.id]))
        added = len(self._echo[index])
        own = [token._replace(offset=token.offset + added) for token in tokens]
        return self._echo[index] + text, before + own, 0

    def _choice(self, index: int, text: str, tokens: Sequence[Token], added: int, finish: str | None) -> dict[str, Any]:
        return self._part(index, text, tokens, added, finish)

    def _part(self, index: int, text: str, tokens: Sequence[Token], added: int, finish: str | None) -> dict[str, Any]:
        shown = None
        if self._logprobs:
            shown = {
                "tokens": [self._name(token.id) for token in tokens],
                "token_logprobs": [_finite(token.logprob) for token in tokens],
                "top_logprobs": [self._likeliest(token) for token in tokens],
                "text_offset": [token.offset + added for token in tokens],
            }
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": finish}

    def _likeliest(self, token: Token) -> dict[str, float | None] | None:
        if token.logprob is None:  # the first of a prompt, which nothing leads to
            return None
        return {self._name(each): _finite(value) for each, value in ((token.id, token.logprob), *token.top)}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._ids else self._served.names.name(token)


class ChatShape(Shape):
    """The same for a conversation."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        """See `Shape.opening`."""
        start = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk([start])]

    def _choice(self, index: int, text: str, tokens: Sequence[Token], added: int, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._shown(tokens), "finish_reason": finish}

    def _part(self, index: int, text: str, tokens: Sequence[Token], added: int, finish: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._shown(tokens), "finish_reason": finish}

    def _shown(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                self._told(token.id, token.logprob)
                | {"top_logprobs": [self._told(each, value) for each, value in token.top]}
                for token in tokens
            ]
        }

    def _told(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": [*self._served.names.raw(token)]}


def usage(answers: Sequence[Answer], prompts: int) -> dict[str, Any]:
    """How many tokens there were; those of a prompt count once, however many choices it has."""
    each = len(answers) // prompts
    prompt, made = sum(len(answer.order.prompt) for answer in answers[::each]), sum(answer.made for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(answer.reused for answer in answers[::each])},
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
