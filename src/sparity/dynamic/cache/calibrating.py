"""What a policy learns of a model from text: `sparity.calibrate_cache`."""

from typing import Any

import torch

from sparity.dynamic.cache.attaching import check_model
from sparity.dynamic.cache.converting import layers_of
from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.learned import Learned, Study
from sparity.dynamic.cache.roles import Spec
from sparity.errors import InvalidInput, wrong_input
from sparity.models import Decoder


@wrong_input()
def calibrate_cache(model: Any, input_ids: Any, *, policy: Spec) -> Learned:
    """What a policy must know of a model before it runs in it; a recipe's stage finds it by itself, and saves it.

    Args:
        model: a Hugging Face causal language model of a family that Sparity knows; it is left as it was.
        input_ids: token ids of texts of one length, `[tokens]` or `[texts, tokens]`; more texts make it surer.
        policy: of `sparity methods cache.policy`, or `{name: options}`.

    Returns:
        Of each block name -> tensor, for `learned` of `sparity.cache`: `retrieval`, bool `[kv_heads]`; `gate`, float32
        `[kv_heads, hidden + 1]`; `centres`, float32 `[heads, width]`; `spans`, float32 `[heads, pairs]`. Nothing for
        policies that learn nothing.

    Raises:
        InvalidInput: texts that are none or too short.
        UnsupportedModel: the policy cannot run in the model.

    Example:
        >>> import sparity, torch
        >>> model, ids = sparity.load("zoo:llama"), torch.arange(100, 356).view(4, 64)
        >>> learned = sparity.calibrate_cache(model, ids, policy="kvzap")
        >>> len(learned), list(learned[0]["gate"].shape)
        (6, [3, 193])
        >>> with sparity.cache(model, "kvzap", keep=80, window=8, learned=learned):
        ...     past = model(torch.arange(200)[None]).past_key_values
        >>> int(past.layers[0].store.lengths.sum())
        240
    """
    built = policy_of(policy)
    check_model(model)
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise InvalidInput(f"input_ids must be texts [texts, tokens], got {ids.dtype} {list(ids.shape)}")
    return built.learn(Study(Decoder.open(model), list(layers_of(model)), ids.long().cpu()))
