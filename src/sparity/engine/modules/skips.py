"""Input channels that are skipped in front of a module, and which tokens of a call are concerned.

A hook of this file is known to the engine: its fast path does what the hook does.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, Literal, NoReturn, TypeGuard

import torch
from torch import Tensor, nn

from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.modules.sequences import CallOfSequences, keep_on, kept_on
from sparity.errors import InvalidInput

FIRST = 4  # tokens at the start of a sequence that stay dense; their activations are often of another size than others
MOST_DRAFTED = 127  # logits of more tokens than a draft and the one before are those of a text that is scored
ATTRIBUTE = "sparity_tokens"
OWNERS = itertools.count()


class SparseTokens:
    """Which tokens of a call are sparse, for all hooks of one model.

    The first `first` real tokens of a sequence are dense. A call that comes with a key-value cache and brings the
    prompt of a generation is dense as a whole unless `prompt` is `sparse`, in whatever chunks the prompt comes; later
    tokens, and drafts that are checked, are sparse. A call without a cache scores a text, which is sparse as if each of
    its tokens had been decoded. `sparsity` is the mean share of the channels that a sparse token skips.
    """

    def __init__(self, first: int = FIRST, prompt: Literal["dense", "sparse"] = "dense", sparsity: float = 0.0) -> None:
        self.first, self.prompt, self.sparsity = first, prompt, sparsity
        self._call = _Call()
        self._owner = next(OWNERS)  # of what is kept of sequences

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseTokens":
        copied = SparseTokens(self.first, self.prompt, self.sparsity)
        copied._owner = self._owner  # a copy of the model may go on with a cache
        return copied

    def __getstate__(self) -> NoReturn:
        raise InvalidInput(
            "a model with run-time stages cannot be pickled: save_pretrained writes it, and from_pretrained reads it"
        )

    def of(self, x: Tensor) -> Tensor | None:
        """Bool, like `x` [..., tokens, in] without its last side, True where a token is sparse; None = all are.

        Raises:
            InvalidInput: `x` holds other tokens than the call that is running.
        """
        flags = self._call.flags
        if flags is None:
            flags = torch.arange(x.shape[-2], device=x.device) >= self.first
            return None if self.first == 0 else flags.expand(x.shape[:-1])
        if self._call.all_sparse:
            return None
        if flags.numel() != x.shape[:-1].numel():
            raise InvalidInput(
                f"inputs {list(x.shape)} in a call of {list(flags.shape)} tokens: channels can be skipped only where a "
                "module sees every token once"
            )
        return flags.to(x.device).reshape(x.shape[:-1])

    @property
    def following(self) -> bool:
        """Whether a call is running whose tokens are known."""
        return self._call.flags is not None

    def sparse_from(self, place: int) -> bool:
        """Whether a token that is generated is sparse if so many real tokens of its row come before it."""
        return place >= self.first and not self._call.whole and not self._call.prompting

    def sequences(self, x: Tensor) -> CallOfSequences:
        """The sequences of the running call; where none runs, those of `x` [rows, tokens, in] as a scored text."""
        running = self._call.sequences
        if running is not None:
            return running
        shape = x.shape[:-1] if x.ndim > 2 else (1, *x.shape[:-1])
        return CallOfSequences(torch.ones(shape, dtype=torch.bool), None, {})

    def between(self, start: int, fresh: int) -> Tensor | None:
        """Of the running call, the `fresh` tokens from position `start` of the cache on: `[rows, fresh]` or None."""
        flags = self._call.flags
        if flags is None or self._call.all_sparse:
            return None
        begin = start - self._call.length
        return flags[:, begin : begin + fresh]

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Follow the calls of a transformers model, with its head or without, or of one block, within the context."""
        base = getattr(module, "base_model", None)
        with ExitStack() as open_:
            if base is None:
                open_.callback(module.register_forward_pre_hook(self._before_block).remove)
                open_.callback(module.register_forward_hook(self._after, always_call=True).remove)
            else:
                inner = base.get_decoder()  # what a causal model calls: of OPT a part of its base model
                open_.callback(inner.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                open_.callback(inner.register_forward_hook(self._after, always_call=True).remove)
                if inner is not module:
                    open_.callback(module.register_forward_pre_hook(self._before_head, with_kwargs=True).remove)
                if hasattr(module, "_prefill"):
                    watching = getattr(module, ATTRIBUTE, ())  # of stages that were attached before
                    open_.callback(_let_go, module, watching)
                    setattr(module, ATTRIBUTE, (*watching, self))
                    module._prefill = MethodType(_prefill, module)  # type: ignore[assignment]
            yield

    def _before_head(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept = named.get("logits_to_keep")
        self._call.drafted = kept - 1 if type(kept) is int and 1 < kept <= MOST_DRAFTED + 1 else 0

    def _before(self, base: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = named.get("inputs_embeds")
        given = next((x for x in (given, named.get("input_ids"), *arguments) if isinstance(x, Tensor)), None)
        if given is None:
            return  # the model will say what is wrong
        cache, (rows, fresh) = named.get("past_key_values"), given.shape[:2]
        length = 0 if cache is None else int(cache.get_seq_length())
        drafted, self._call.drafted = self._call.drafted, 0
        mask = named.get("attention_mask")
        flags = (self._positions(mask, rows, length, fresh) >= self.first).expand(rows, fresh)
        of_prompt = None if cache is None else self._of_prompt(length, fresh, drafted)
        if self._call.whole:
            flags = torch.zeros(rows, fresh, dtype=torch.bool)
        elif of_prompt is not None and self.prompt == "dense":
            flags = flags & (torch.arange(fresh) >= of_prompt)
        kept = {} if cache is None else kept_on(cache, self._owner, starts=not length)
        self._call.begin(flags.clone(), length, CallOfSequences(_real(mask, rows, length, fresh), of_prompt, kept))

    def _of_prompt(self, length: int, fresh: int, drafted: int) -> int:
        """How many of the new tokens at the front belong to a prompt."""
        if self._call.prompting:
            return fresh
        before = fresh - min(drafted, fresh)
        return 0 if length and before == 1 else before

    def _before_block(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        rows, tokens = arguments[0].shape[:2]
        every = torch.ones(rows, tokens, dtype=torch.bool)
        self._call.begin((torch.arange(tokens) >= self.first).expand(rows, tokens), 0, CallOfSequences(every, None, {}))

    def _after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        sequences, made = self._call.sequences, getattr(output, "past_key_values", None)
        if sequences is not None and sequences.prompt is None and made is not None:
            keep_on(made, self._owner, sequences.kept)
        self._call.flags = self._call.sequences = None

    @staticmethod
    def _positions(mask: Any, rows: int, length: int, fresh: int) -> Tensor:
        """The place of each new token among the real ones of its row, from 0: `[rows, fresh]` or `[1, fresh]`."""
        if _says_padding(mask, rows, length, fresh):
            return mask.cpu().ne(0).long().cumsum(1)[:, length:] - 1
        return torch.arange(length, length + fresh)[None]

    @contextmanager
    def prompting(self) -> Iterator[None]:
        """Calls within the context bring a prompt, however few tokens they have."""
        before, self._call.prompting = self._call.prompting, True
        try:
            yield
        finally:
            self._call.prompting = before

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Calls of the model within the context are dense, all of their tokens."""
        before, self._call.whole = self._call.whole, True
        try:
            yield
        finally:
            self._call.whole = before


def tokens_of(model: Any) -> SparseTokens | None:
    """What says which tokens of a causal language model are sparse, the latest of several; None where none is."""
    found: tuple[SparseTokens, ...] = getattr(model, ATTRIBUTE, ())
    return found[-1] if found else None


class _Call(threading.local):
    """The call that is running in this thread."""

    flags: Tensor | None = None  # [rows, tokens]
    all_sparse = False
    length = 0
    drafted = 0
    prompting = False
    whole = False
    sequences: CallOfSequences | None = None

    def begin(self, flags: Tensor, length: int, sequences: CallOfSequences) -> None:
        self.flags, self.all_sparse, self.length = flags, bool(flags.all()), length
        self.sequences = sequences


class InputSkip:
    """A forward pre-hook: channels of a module's input that a rule leaves out are the rule's centre, else 0."""

    def __init__(self, rule: SkipRule, tokens: SparseTokens) -> None:
        self.rule, self.tokens = rule, tokens

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The module's arguments with the input masked."""
        return (self.masked(arguments[0]), *arguments[1:])

    def masked(self, x: Tensor) -> Tensor:
        """`x` [..., tokens, in] with the channels left out, in the tokens that are sparse."""
        flags = self.tokens.of(x)
        if flags is not None and not bool(flags.any()):
            return x
        self.rule = self.rule.like(x)
        filled = self.rule.fill(x)
        return filled if flags is None else torch.where(flags[..., None], filled, x)


class OutputSkip(InputSkip):
    """A forward hook that does the same with a module's output: neurons that an activation function leaves small."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:  # type: ignore[override]
        """The output, masked."""
        return self.masked(output)


def skip_of(module: nn.Module) -> InputSkip | None:
    """What skips channels of a module's input; None where nothing does."""
    return next((hook for hook in module._forward_pre_hooks.values() if type(hook) is InputSkip), None)


def output_skip_of(module: nn.Module) -> OutputSkip | None:
    """What skips channels of a module's output; None where nothing does."""
    return next((hook for hook in module._forward_hooks.values() if type(hook) is OutputSkip), None)


def skips_below(module: nn.Module) -> list[InputSkip]:
    """All that skips inputs or outputs of a module and of those inside it."""
    found = (skip for below in module.modules() for skip in (skip_of(below), output_skip_of(below)))
    return [skip for skip in found if skip is not None]


def _says_padding(mask: Any, rows: int, length: int, fresh: int) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.shape == (rows, length + fresh)


def _real(mask: Any, rows: int, length: int, fresh: int) -> Tensor:
    """Which of the new tokens are no padding: `[rows, fresh]`."""
    if _says_padding(mask, rows, length, fresh):
        return mask.cpu().ne(0)[:, length:]
    return torch.ones(rows, fresh, dtype=torch.bool)


def _prefill(model: Any, *arguments: Any, **named: Any) -> Any:
    with ExitStack() as open_:
        for tokens in getattr(model, ATTRIBUTE):
            open_.enter_context(tokens.prompting())
        return type(model)._prefill(model, *arguments, **named)


def _let_go(module: Any, watching: tuple[SparseTokens, ...]) -> None:
    if watching:
        setattr(module, ATTRIBUTE, watching)
    else:
        del module._prefill
        delattr(module, ATTRIBUTE)
