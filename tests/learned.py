"""What policies of the cache learn of the tests' models, found once for each; and what they are told on tensors."""

import torch

import sparity
from sparity import registry
from sparity.dynamic.cache.functions import policy_of

_FOUND = {}


def learned_of(model, name, **options):
    """`learned` for a policy in a model, as a named argument; nothing where it reads no text."""
    if not registry.get("cache.policy", name).reads_text:
        return {}
    key = (id(model), name, str(options))
    if key not in _FOUND:
        ids = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(7))
        _FOUND[key] = model, sparity.calibrate_cache(model, ids, policy={name: options})  # the model stays, as its id
    return {"learned": _FOUND[key][1]}


def told(name, states):
    """What `select_cache` is to be told besides queries, keys and values: it depends on these, whatever their order."""
    queries, keys, _ = states
    built, found = policy_of(name), {}
    if "hidden" in built.told:
        found["hidden"] = queries.double().mean(1).float()
    if "gate" in built.learns:
        weights = keys.double().mean((0, 2)).float()
        found["gate"] = torch.cat([weights, weights[:, :1]], 1)
    if "centres" in built.learns:
        centres = keys.double().mean((0, 2)).float().repeat_interleave(queries.shape[1] // keys.shape[1], 0)
        found |= {"centres": centres, "spans": 1 + centres[:, :4].abs() + centres[:, 4:].abs()}
    return found
