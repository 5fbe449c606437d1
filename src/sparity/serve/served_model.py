"""A model with all that is needed to answer requests to it."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from sparity import __version__
from sparity.engine.attach import attach
from sparity.errors import InvalidInput
from sparity.models import transformers as hf
from sparity.models.loading import load, load_tokenizer
from sparity.serve.execution.alone import Alone
from sparity.serve.execution.base import Execution
from sparity.serve.execution.steps import Steps, declines
from sparity.serve.prefixes import Prefixes
from sparity.serve.scheduler import Scheduler
from sparity.serve.token_names import TokenNames


class ServedModel:
    """A model, its tokenizer, and the scheduler of its requests.

    Args:
        name: by which requests ask for it.
        execution: which computes tokens.
        tokenizer: of transformers.
        ends: tokens by which a text ends.
        template: a chat template in place of the tokenizer's own.
        prefix_bytes: memory for keys and values of texts that were read before.
    """

    def __init__(
        self,
        name: str,
        execution: Execution,
        tokenizer: Any,
        ends: frozenset[int],
        template: str | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        self.name, self.tokenizer, self.ends = name, tokenizer, ends
        self.execution, self.created = execution, int(time.time())
        self.names = TokenNames(tokenizer)
        self.scheduler = Scheduler(execution, Prefixes(execution, prefix_bytes) if execution.block_bytes(1) else None)
        self.kind = "model"
        self._template = template
        self._one_at_a_time = threading.Lock()
        self.encode("a")  # a tokenizer sets itself up at its first call

    @property
    def fingerprint(self) -> str:
        """What a client can tell by that other weights answered."""
        return f"sparity-{__version__}-{self.kind}"

    def check_stands_in(self, other: "ServedModel") -> None:
        """Refuse a model that cannot take over requests to `other`.

        Raises:
            InvalidInput: it has other tokens, or takes fewer.
        """
        if self.execution.vocabulary != other.execution.vocabulary or (
            self.tokenizer.get_vocab() != other.tokenizer.get_vocab()
        ):
            raise InvalidInput(f"the {self.kind} model has other tokens than the {other.kind} one")
        if self.execution.context < other.execution.context:
            raise InvalidInput(
                f"the {self.kind} model takes {self.execution.context} tokens, the {other.kind} one "
                f"{other.execution.context}: lower --context"
            )

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._template or self.tokenizer.chat_template)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around every text unless `special` is False."""
        with self._one_at_a_time:
            ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones among them."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def conversation(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            InvalidInput: there is no template, or it refuses the messages.
        """
        if not self.chats:
            raise InvalidInput(
                f"{self.name} has no chat template: ask for a completion, or serve it with --chat-template FILE"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, chat_template=self._template
            )
        except Exception as error:  # a template is a program, which says in its own way what it does not take
            raise InvalidInput(f"the chat template refuses these messages: {hf.first_words(error)}") from error
        return self.encode(text, special=False)


def open_model(
    path: str,
    *,
    name: str | None = None,
    slots: int = 8,
    context: int | None = None,
    most: int = 32,
    prefix_bytes: int = 0,
    template: str | None = None,
    runtime: bool = True,
) -> ServedModel:
    """Load a model to be served.

    Args:
        path: a folder, plain or packed, a Hugging Face name, a GGUF file, or one of the zoo.
        name: by which requests ask for it; None = its path.
        slots: requests that are worked on at a time.
        context: tokens of each; None = what the model takes.
        most: tokens that are computed at a time, of all requests.
        prefix_bytes: see `ServedModel`, as is `template`.
        runtime: whether the run-time stages that it was saved with are attached.

    Raises:
        InvalidInput: it has no tokenizer, takes fewer tokens than `context`, or does not fit into memory.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise InvalidInput(f"{path} has no tokenizer: a server needs the folder with its tokenizer.json")
    model = load(path, runtime=runtime)
    known = hf.context_length(model.config)
    if context is not None and known and context > known:
        raise InvalidInput(f"--context {context}: {path} takes {known} tokens")
    if most < slots:
        raise InvalidInput(f"{slots} requests at a time need {slots} tokens in a step, not {most}")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # it may still be the file's memory, and files change
    if model.dtype == torch.bfloat16:
        attach(model)
    room, reason = context or known or 2048, declines(model)
    execution = Steps(model, slots, room, most) if reason is None else Alone(model, slots, room, reason)
    return ServedModel(name or path, execution, tokenizer, ends_of(model, tokenizer), template, prefix_bytes)


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens by which a model ends a text."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = found if isinstance(found, list) else [found]
    vocabulary = model.get_input_embeddings().num_embeddings
    return frozenset(
        token for token in (*own, tokenizer.eos_token_id) if isinstance(token, int) and 0 <= token < vocabulary
    )
