"""A policy put on a transformers model and taken off: `sparity.cache`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparity.dynamic.cache.attending import attention
from sparity.dynamic.cache.converting import before_call, layers_of
from sparity.dynamic.cache.layer import PolicyLayer
from sparity.dynamic.cache.learned import Learned, Sizes, Study, key_sites, misfit
from sparity.dynamic.cache.narrowing import narrowing
from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.rereading import read_again
from sparity.dynamic.cache.roles import Keep, Roles, roles, shares_of
from sparity.dynamic.cache.run import Run, Share, rotary_of
from sparity.errors import InvalidInput, UnsupportedModel, wrong_input
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites

PREFIX = "sparity_cache_"  # before the name of the attention that runs where nothing was evicted
RUN = "sparity_cache_run"  # of a model at whose attention a policy is at work
SINKS, RECENT = 4, 16


@contextmanager
def cache(
    model: Any,
    policy: str | Mapping[str, Any],
    keep: Keep = 0.25,
    *,
    store: str | Mapping[str, Any] | None = None,
    read: str | Mapping[str, Any] | None = None,
    read_keep: float = 0.25,
    sinks: int = SINKS,
    recent: int = RECENT,
    every: int = 1,
    decode: bool | None = None,
    exact: bool = True,
    learned: Learned | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A model that keeps part of its key-value cache within the context, and is what it was afterwards.

    Where nothing is evicted, quantised or left unread the model's own attention runs, and results are those of the
    whole cache bit for bit. An evicted token's memory is freed, and attention is what dense attention would be with
    that token masked. `generate` and its options are transformers' own.

    Args:
        model: a Hugging Face causal language model, on any device.
        policy: of `sparity methods cache.policy`, or `{name: options}`. With `kivi`, `minicache`,
            `quest` and `pqcache` everything stays.
        keep: of each layer the share of the text's tokens that stay, in (0, 1], or their number from 2 on; with
            `quest` and `pqcache` that are read. Or one for each layer, or one for each of its KV heads
            (`sparity.cache_budgets`).
        store: how tokens that stay are stored, `kivi` or `{"kivi": options}`; None = as they are.
        read: which of them each new token reads, `quest`, `pqcache` or `{name: options}`; None = everything.
        read_keep: what share of the text's tokens it reads, or how many.
        sinks: tokens at the start of each text that stay whatever the policy says, and that `keep` counts.
        recent: tokens at its end that stay, likewise. A share that comes to fewer than are protected keeps those.
        every: tokens between two evictions while decoding; so many more are held meanwhile.
        decode: whether tokens are evicted while decoding; None = if the policy was made to.
        exact: whether a layer that holds and reads everything runs the model's own attention; False = new tokens run
            compiled attention where there is any, which is faster and differs in rounding.
        learned: what `sparity.calibrate_cache` found of this model, for policies that learn from text.
        options: the policy's.

    A prompt, and every later call that adds at least as many tokens as the policy observes, is read whole and evicted
    from afterwards. Layers with a sliding window keep their own cache.

    Yields:
        The model.

    Raises:
        InvalidInput: an unknown policy or option, or a request that cannot be met.
        UnsupportedModel: attention that does not go through transformers' interface.

    Example:
        >>> import sparity, torch
        >>> model, ids = sparity.load("zoo:llama"), torch.arange(100)[None]
        >>> with sparity.cache(model, "snapkv", keep=0.5):
        ...     past = model(ids).past_key_values
        >>> past.get_seq_length(), int(past.layers[0].store.lengths[0])
        (100, 50)
    """
    with wrong_input()(_prepared)(
        model,
        policy,
        keep,
        options,
        store=store,
        read=read,
        read_keep=read_keep,
        sinks=sinks,
        recent=recent,
        every=every,
        decode=decode,
        exact=exact,
        learned=learned,
    ) as attached:
        yield attached


def _prepared(
    model: Any,
    policy: Any,
    keep: Any,
    options: Mapping[str, Any],
    *,
    exact: bool,
    learned: Learned | None,
    **asked: Any,
) -> Any:
    if options and not isinstance(policy, str):
        raise InvalidInput("give the policy's options by name, or with it as {name: options}, not both")
    policy = {policy: dict(options)} if isinstance(policy, str) else policy
    return attached(model, run_of(model, roles(policy, keep, **asked), None, learned, exact=exact, **asked))


def run_of(
    model: Any,
    found: Roles,
    keep: Sequence[Share] | None = None,
    learned: Learned | None = None,
    *,
    sinks: int,
    recent: int,
    every: int,
    decode: bool | None,
    exact: bool = True,
    **_: Any,
) -> Run:
    """A request as a run of a model.

    Args:
        model: that it is of.
        found: the request.
        keep: each layer's share, or those of its heads, where they differ.
        learned: what the policy is to know of each layer; None = it is found, where that needs no text.
        sinks: and all others, see `cache`.
        recent: see there.
        every: see there.
        decode: see there.
        exact: see there.

    Raises:
        InvalidInput: what is learned is missing, or of another model or policy.
        UnsupportedModel: the policy needs to know of the model what it does not say, or layers to merge.
    """
    policy = found.policy
    config = model.config.get_text_config(decoder=True)
    asked = found if keep is None else replace(found, keep=tuple(keep))
    keep = shares_of(asked, config.num_hidden_layers, Sizes.of(config).kv_heads)
    decode = policy.evicts_while_decoding if decode is None else decode
    if learned is None and policy.learns and not policy.reads_text:
        learned = policy.learn(Study(Decoder.open(model), list(layers_of(model))))
    check_learned(policy, learned or [{} for _ in keep], config)
    return Run(
        policy,
        keep,
        sinks,
        recent,
        every,
        decode,
        rotary_of(model, policy),
        found.codec,
        found.reader,
        found.read_keep,
        learned or [{} for _ in keep],
        exact,
        policy.pairs(layers_of(model)),
    )


def check_learned(policy: Policy, learned: Learned, config: Any) -> None:
    """Refuse what does not fit a policy or a model; raises `InvalidInput`."""
    sizes = Sizes.of(config)
    if policy.reads_text and not any(learned):
        raise InvalidInput(
            f"{policy.name} learns from text: give learned=sparity.calibrate_cache(model, ids, policy={policy.name!r})"
            ", or run it as a recipe's stage with calibration text"
        )
    if len(learned) != int(config.num_hidden_layers):
        raise InvalidInput(f"`learned` is of {len(learned)} blocks, and the model has {config.num_hidden_layers}")
    for index, each in enumerate(learned):
        if {*each} != policy.learns:
            had, wanted = ", ".join(sorted(each)) or "nothing", ", ".join(sorted(policy.learns)) or "nothing"
            raise InvalidInput(f"{policy.name} is to know {wanted} of each block, and `learned` holds {had}")
        for name, tensor in each.items():
            if wrong := misfit(name, tensor, sizes):
                raise InvalidInput(f"`learned`, block {index}: {name} is {wrong}: of another model?")


@contextmanager
def attached(model: Any, run: Run) -> Iterator[Any]:
    """Let a model's calls use caches with a policy until the context closes.

    Raises:
        InvalidInput: another policy is attached.
        UnsupportedModel: see `cache`.
    """
    check_model(model)
    base, before = model.base_model, model.config._attn_implementation
    with ExitStack() as closing:
        closing.callback(setattr, run, "open", False)
        setattr(model, RUN, run)
        closing.callback(delattr, model, RUN)
        _switch(model, PREFIX + before)
        closing.callback(_switch, model, before)
        for module in {id(each): each for each in (model, base)}.values():
            handle = module.register_forward_pre_hook(partial(before_call, model, run), with_kwargs=True)
            closing.callback(handle.remove)
            if run.policy.rereads:
                closing.callback(module.register_forward_hook(partial(read_again, run), with_kwargs=True).remove)
        closing.callback(base.register_forward_hook(_check_read, with_kwargs=True).remove)
        if run.policy.narrows:
            closing.enter_context(narrowing(model, run))
        if "hidden" in run.policy.told:
            for index, site in enumerate(key_sites(input_sites(model))):
                closing.enter_context(site.watch(partial(run.hidden.__setitem__, index)))
        yield model


def check_model(model: Any) -> None:
    """Refuse a model whose cache cannot have a policy; see `attached`."""
    before = model.config._attn_implementation
    if before.startswith(PREFIX):
        raise InvalidInput(
            "a policy is at work in this model already: close its context first, or load the model with runtime=False"
        )
    kind = model.config.model_type
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedModel(f'attention of "{kind}" does not go through transformers\' interface: no policy can run')
    if before not in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()) or before.startswith("paged"):
        raise UnsupportedModel(
            f'attention "{before}" cannot be replaced where tokens were evicted: load with sdpa or eager'
        )
    if not any(layers_of(model)):
        raise UnsupportedModel(
            f'no layer of this "{kind}" sees the whole text (sliding windows): nothing is to be evicted'
        )


def _switch(model: Any, name: str) -> None:
    """Let a model attend by the implementation of a name, which is registered first if it is one of ours."""
    if name.startswith(PREFIX):
        before = name.removeprefix(PREFIX)
        AttentionInterface.register(name, partial(attention, before))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(name)


def _check_read(module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
    """After a call: every layer's keys must have reached attention."""
    given = named.get("past_key_values")
    for layer in given.layers if isinstance(given, Cache) else ():
        if isinstance(layer, PolicyLayer):
            layer.check_read()
