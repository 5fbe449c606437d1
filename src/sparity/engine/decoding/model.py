"""What makes a transformers model decode faster without changing its results, put on and taken off.

- Linear layers that are not packed are multiplied by the engine's dense kernels (`DenseLinear`).
- The key-value cache grows in place (`cache.py`), in every model that uses an ordinary one.
- A few new tokens per row of a batch take the fast path (`fast_path.py`) in the models that it knows. Anything else
  that a call asks for, such as attention weights, gradients, hooks, other caches or masks, runs the model's own code;
  `fallbacks` says how often, and why.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparity.engine.decoding import cache as cache_layers
from sparity.engine.decoding import drafts, generation, llama_layout
from sparity.engine.decoding.change_detector import Snapshot
from sparity.engine.decoding.fast_path import MOST_TOKENS, Step
from sparity.engine.decoding.rotary import by_length, forget
from sparity.engine.modules.linear import DenseLinear, Head
from sparity.engine.modules.packed_module import NOT_PICKLED, HoldsPacked
from sparity.errors import InvalidInput
from sparity.visible import logger

log = logger(__name__)


def enable_fast_path(model: Any) -> Any:
    """Make a causal language model decode faster, in place; the model is returned."""
    head = model.get_output_embeddings()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16:
            (Head if layer is head else DenseLinear).adopt(layer)
    drafts.watch(model)
    base = model.base_model
    if not isinstance(base, FastPath):
        base.__class__ = _fast_path_class(type(base))  # type: ignore[arg-type]  # classes are hashable
    base.engine, base.fallbacks = Engine(base), Counter()
    generation.quicken(model)
    return model


def has_fast_path(model: Any) -> bool:
    """Whether a model is on the engine."""
    return isinstance(model.base_model, FastPath)


def disable_fast_path(model: Any) -> None:
    """Undo `enable_fast_path`."""
    base = model.base_model
    if isinstance(base, FastPath):
        del base.engine, base.fallbacks
        base.__class__ = type(base).__mro__[2]
    drafts.unwatch(model)
    generation.slow_down(model)
    for layer in model.modules():
        if isinstance(layer, DenseLinear):
            layer.release()


def declines(model: Any) -> str | None:
    """Why a model does not decode on the fast path, or None when it does."""
    base = model.base_model
    if not has_fast_path(model):
        return "it is not attached to the engine"
    engine = _engine(base)
    if engine.reason is None and engine.made_of.hooked():
        return "hooks, such as those of stages at run time, are called by the model's own code"
    return engine.reason


def step_of(model: Any) -> Step | str:
    """The compiled step of an attached model as it is now, or why there is none; see `declines`."""
    reason = declines(model)
    step = None if reason else _engine(model.base_model).step
    return step if step is not None else reason or "it has no fast path"


def fallbacks(model: Any) -> Counter[str]:
    """Why calls of a model ran its own code since it was attached, and how many did; empty where it is not attached.

    Calls under `torch.compile` are not counted.
    """
    return Counter(model.base_model.fallbacks) if has_fast_path(model) else Counter()


class Engine:
    """The fast path of one model as it is now, or why there is none; a copy of the model makes its own."""

    def __init__(self, base: Any) -> None:
        self.reason = llama_layout.declines(base)
        self.made_of = Snapshot(base)  # after `declines`, which may move dense weights to other memory
        self.step = None if self.reason else Step(base, self.made_of)
        if self.reason:
            log.info("no fast path for decoding: %s", self.reason)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __getstate__(self) -> NoReturn:
        raise InvalidInput(NOT_PICKLED)


class FastPath:
    """Marks the classes that `_fast_path_class` makes."""

    engine: Engine | None
    fallbacks: Counter[str]

    def checks_drafts(self) -> bool:
        """Whether calls may be marked with the number of their tokens that are a draft."""
        return _engine(self).step is not None

    def step_now(self) -> Step | str:
        """The compiled step of the model as it is now, or why there is none."""
        engine = _engine(self)
        return engine.step if engine.step is not None else engine.reason or "it has no fast path"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, HoldsPacked):
                module.refuse_move(fn)  # before anything is moved
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle looks for a class by its name, which is the original's
        return _empty, (type(self).__mro__[2],), vars(self)


def _engine(base: Any) -> Engine:
    if base.engine is None or base.engine.made_of.changed():
        base.engine = Engine(base)
    found: Engine = base.engine
    return found


def _empty(original: Any) -> Any:
    made = _fast_path_class(original)
    return made.__new__(made)


@cache
def _fast_path_class(cls: Any) -> Any:
    """`cls` with another `forward`, under its own name, which transformers looks things up by."""

    @wraps(cls.forward)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return cls.forward(self, *arguments, **named)
        drafted = named.pop(drafts.MARK, 0)
        if drafted and (calls := _calls(self, arguments, named, drafted)):
            hidden = torch.cat([forward(self, **call).last_hidden_state for call in calls], 1)
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=named["past_key_values"])
        found = "gradients are recorded" if torch.is_grad_enabled() else _on_fast_path(self, arguments, named)
        if isinstance(found, str):
            self.fallbacks[found] += 1
            forget(getattr(self, "rotary_emb", None))
            return cls.forward(self, *arguments, **named)
        return BaseModelOutputWithPast(last_hidden_state=found, past_key_values=named["past_key_values"])

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (FastPath, cls), {**names, "forward": forward})


def _on_fast_path(base: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor | str:
    """What `_decode` gives, or why a call cannot get that far."""
    layers = cache_layers.use_growing_layers(named.get("past_key_values"))
    if layers is None:
        return cache_layers.declines(named.get("past_key_values")) or "the cache is of another kind"
    engine = _engine(base)
    if engine.step is None:
        return engine.reason or "it has no fast path"
    if arguments:
        return "inputs are given by place, not by name"
    return _decode(base, engine.step, layers, **named)


def _calls(base: Any, arguments: tuple[Any, ...], named: dict[str, Any], drafted: int) -> list[dict[str, Any]]:
    """The calls that check a draft as single steps would; none where one call does, or where there is no fast path."""
    layers, step = cache_layers.use_growing_layers(named.get("past_key_values")), _engine(base).step
    given = named.get("inputs_embeds") if named.get("input_ids") is None else named["input_ids"]
    if torch.is_grad_enabled() or arguments or layers is None or step is None or not isinstance(given, Tensor):
        return []
    (rows, fresh), length = given.shape[:2], layers[0].get_seq_length() if layers else 0
    if not 0 < rows <= MOST_TOKENS or drafted >= fresh:
        return []
    sizes = drafts.parts(fresh, drafted, length, MOST_TOKENS // rows, by_length(base.rotary_emb))
    calls = drafts.cut(named, sizes, length) if len(sizes) > 1 else []
    alike = drafts.cut(named, [1, fresh - 1], length) if calls else []  # a step now would be taken as one then
    return [] if alike and _declines(step, layers, **alike[0]) else calls


def _decode(base: Any, step: Step, layers: list[Any], **named: Any) -> Tensor | str:
    """Hidden states `[batch, new, hidden]` after the last norm, or why the model's own code must run."""
    if reason := _declines(step, layers, **named):
        return reason
    embeddings, positions = named.get("inputs_embeds"), named.get("position_ids")
    if embeddings is None:
        embeddings = base.embed_tokens(named["input_ids"])
    length = layers[0].get_seq_length() if layers else 0
    if positions is None:
        positions = torch.arange(length, length + embeddings.shape[1])[None]
    return step(embeddings, positions, named.get("attention_mask"), layers, length)


def _declines(
    step: Step,
    layers: list[Any],
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **options: Any,
) -> str | None:
    """Why a call must run the model's own code, or None."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    if (input_ids is None) == (inputs_embeds is None):
        return "either ids or embeddings are needed"
    if not isinstance(given, Tensor) or given.ndim != (2 if inputs_embeds is None else 3):
        return "ids are no tensor [batch, new], or embeddings none of [batch, new, hidden]"
    if use_cache is False:
        return "the call asks for no cache"
    length = layers[0].get_seq_length() if layers else 0
    rows, fresh = given.shape[:2]
    if reason := step.declines(rows, fresh, attention_mask, position_ids, layers, length, options):
        return reason
    unknown = step.skipped is not None and not step.skipped.following
    return "channels are skipped, and nobody says in which tokens" if unknown else None
