"""`generate` of an attached model without what each token costs in Python.

transformers' own loop runs, with its processors, criteria, streamers and outputs. For every token it asks the model for
inputs, calls it, and lets it count on. In a call of `generate` where only code of transformers and of Sparity runs
between two tokens, nothing of the model can change there: it is looked at once, behind the prompt, and from then on the
three do nothing but a step of the library (`single_steps.py`) and the head. Whatever else a call asks for takes the way
that calls of the model take.
"""

from collections.abc import Iterable, Mapping
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparity.engine.decoding import cache as cache_layers
from sparity.engine.decoding import drafts, llama_layout
from sparity.engine.decoding.fast_path import Step
from sparity.engine.decoding.single_steps import SingleSteps
from sparity.engine.modules.embedding import PackedEmbedding, PackedHead
from sparity.engine.modules.linear import Head
from sparity.engine.modules.skips import SparseTokens

MARK = "decoding_session"  # its place among the arguments that the loop hands on
MODELS = tuple(name.replace("Model", "ForCausalLM") for name in llama_layout.MODELS)
KNOWN = {  # of what the loop hands on, all that a step goes by, and embeddings, which are the prompt's
    "past_key_values",
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "inputs_embeds",
}
CALLS_USERS = ("PrefixConstrainedLogitsProcessor",)  # classes of transformers that call a user's function


class Result(CausalLMOutputWithPast):
    """What a quick step gave; its class tells the loop's next question from others."""


class Session:
    """One call of `generate`: its loop asks for one token after another.

    Args:
        declined: why none of its steps can be quick, or None.
    """

    def __init__(self, declined: str | None) -> None:
        self.declined = declined
        self._prompted = False
        self._steps: SingleSteps | None = None
        self._embedding: Any = None
        self._head: Any = None
        self._cache: Any = None

    def takes(self, model: Any, input_ids: Tensor, named: Mapping[str, Any]) -> bool:
        """Whether the step that the loop prepares, with these arguments, is a quick one."""
        if self._steps is None and self._prompted and self.declined is None:
            self.declined = self._begin(model, len(input_ids), named)
        return self._steps is not None

    def step(self, input_ids: Tensor) -> Result:
        """`input_ids` `[rows, 1]` -> logits `[rows, 1, vocabulary]`."""
        assert self._steps is not None, "`takes` comes first"
        hidden = self._steps(self._embedding(input_ids[:, 0]))
        logits = self._head.prepared.each_alone(hidden) if self._head.bias is None else self._head(hidden)
        return Result(logits=logits[:, None], past_key_values=self._cache)

    def count(self, outputs: Any) -> bool:
        """Whether the loop need not count a token, since a quick step gave it."""
        self._prompted = True
        return isinstance(outputs, Result)

    def _begin(self, model: Any, rows: int, named: Mapping[str, Any]) -> str | None:
        """Prepare the steps, or say why there are none."""
        base = model.base_model
        find = getattr(base, "step_now", None)  # another model may have been put in its place
        step = find() if find is not None else "it is not attached to the engine"
        if not isinstance(step, Step):
            return str(step)
        head, embedding = model.get_output_embeddings(), base.get_input_embeddings()
        layers = cache_layers.use_growing_layers(named.get("past_key_values"))
        if layers is None or any(type(layer) is not cache_layers.GrowingLayer for layer in layers) or not layers:
            return "the cache is of another kind"
        if reason := _outline_declines(model, head, embedding):
            return reason
        length, mask, positions = layers[0].get_seq_length(), named.get("attention_mask"), named.get("position_ids")
        if isinstance(positions, Tensor):
            positions = positions[..., -1:]
        asked = {name: value for name, value in named.items() if name not in KNOWN}
        if named.get("use_cache") is False or not length:
            return "nothing is cached"
        if reason := step.declines(rows, 1, mask, positions, layers, length, asked):
            return reason
        places = torch.tensor([[length]]) if mask is None else mask.ne(0).sum(1, keepdim=True) - 1
        if not all(tokens.sparse_from(int(places.min())) for tokens in _watching(model, base)):
            return "the first tokens are dense"
        steps = SingleSteps(step, layers, torch.tensor([[length]]) if positions is None else positions, rows, mask)
        if steps.reason is None:
            self._steps, self._embedding, self._head, self._cache = steps, embedding, head, named["past_key_values"]
        return steps.reason


class OneByOne:
    """Marks the classes that `_one_by_one` makes."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle looks for a class by its name, which is the original's
        return _empty, (type(self).__mro__[2],), vars(self)


def quicken(model: Any) -> None:
    """Let `generate` of a causal language model take quick steps, in place."""
    if type(model).__name__ in MODELS and not isinstance(model, OneByOne):
        model.__class__ = _one_by_one(type(model))  # type: ignore[arg-type]  # classes are hashable


def slow_down(model: Any) -> None:
    """Undo `quicken`."""
    if isinstance(model, OneByOne):
        model.__class__ = type(model).__mro__[2]


def _empty(original: Any) -> Any:
    made = _one_by_one(original)
    return made.__new__(made)


def _strange(callbacks: Iterable[Any]) -> str | None:
    """Why what runs between two tokens may change the model, or None."""
    for callback in callbacks:
        kind = type(callback)
        ours = kind.__module__.startswith(llama_layout.OURS) and kind.__name__ not in CALLS_USERS
        if callback is not None and not ours:
            return f"{kind.__name__} runs between tokens"
    return None


def _outline_declines(model: Any, head: Any, embedding: Any) -> str | None:
    """Why what lies around the blocks is not what the steps put there, or None."""
    for kind, forward in llama_layout.forwards([model]):
        if not forward.__module__.startswith(("torch.nn.", *llama_layout.OURS)):
            return f"{kind.__name__}.forward was replaced by one of {forward.__module__}"
    plain = isinstance(embedding, nn.Embedding) and embedding.max_norm is None
    if type(head) not in (Head, PackedHead) or not (plain or type(embedding) is PackedEmbedding):
        return f"its head is a {type(head).__name__}, its embedding a {type(embedding).__name__}"
    if head.prepared is None:
        return "the compiled kernels do not multiply its head"
    around = (model, model.base_model, head, embedding)
    if any("forward" in vars(module) for module in around):
        return "a module has another forward"
    odd = [hook for module in around for hook in _hooks(module) if hook is not drafts.mark and _tokens(hook) is None]
    return f"modules have hooks: {odd[0]}" if odd else None


def _watching(model: Any, base: Any) -> set[SparseTokens]:
    found = (_tokens(hook) for module in (model, base) for hook in _hooks(module))
    return {tokens for tokens in found if tokens is not None}


def _hooks(module: Any) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _tokens(hook: Any) -> SparseTokens | None:
    """What follows a model's calls by a hook, if that is what a hook is for."""
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, SparseTokens) else None


@cache
def _one_by_one(cls: Any) -> Any:
    """`cls` with what its loop calls for each token in front of its own, under its own name."""

    @wraps(cls._sample)
    def sample(self: Any, *arguments: Any, **named: Any) -> Any:
        between = [*(named.get("logits_processor") or ()), *(named.get("stopping_criteria") or ())]
        session = Session(_strange([*between, named.get("streamer")]))
        return cls._sample(self, *arguments, **named, **{MARK: session})

    @wraps(cls.prepare_inputs_for_generation)
    def prepare(self: Any, input_ids: Tensor, *arguments: Any, **named: Any) -> Any:
        session = named.pop(MARK, None)
        if session is None or arguments or named.get("next_sequence_length") != 1:
            return cls.prepare_inputs_for_generation(self, input_ids, *arguments, **named)
        asked = {name: value for name, value in named.items() if name != "next_sequence_length"}
        if session.takes(self, input_ids, asked):
            return {"input_ids": input_ids[:, -1:], MARK: session}
        return cls.prepare_inputs_for_generation(self, input_ids, **named)

    @wraps(cls._update_model_kwargs_for_generation)
    def update(self: Any, outputs: Any, model_kwargs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        session = model_kwargs.get(MARK)
        if session is not None and session.count(outputs):
            return model_kwargs
        return cls._update_model_kwargs_for_generation(self, outputs, model_kwargs, *arguments, **named)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        session = named.get(MARK)
        return cls.__call__(self, *arguments, **named) if session is None else session.step(named["input_ids"])

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    own = {
        "_sample": sample,
        "prepare_inputs_for_generation": prepare,
        "_update_model_kwargs_for_generation": update,
        "__call__": call,
    }
    return type(cls.__name__, (OneByOne, cls), {**names, **own})
