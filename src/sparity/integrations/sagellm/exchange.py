"""From and to the dictionary in which sageLLM's requests carry a sparsity configuration."""

from collections.abc import Mapping
from typing import Any

from sparity.errors import InvalidInput, suggestion
from sparity.integrations.sagellm import meaning
from sparity.integrations.sagellm.protocol import SparsityConfig

PATTERNS = {"unstructured": "unstructured", "n:m": "semi_structured", "block": "block"}
N_M = "n_m"
OWN = "sparity"  # the key of `metadata` under which fields go that the dictionary has no key for
KEYS = ("enabled", "pattern", "sparse_format", "sparsity_ratio", "n", "m", "block_size", "metadata")
DIRECT = ("sparsity_ratio", "n", "m", "block_size")


def to_sparse_config(config: SparsityConfig) -> dict[str, Any]:
    """The dictionary of a configuration; what it has no key for goes under `metadata["sparity"]`.

    Raises:
        InvalidInput: pattern "dynamic", which is no sparsity of weights.
    """
    meaning.check(config)
    if config.pattern not in PATTERNS:
        raise InvalidInput(f'pattern "{config.pattern}" leaves the weights alone: a SparseConfig cannot say it')
    n_of_m = config.pattern == "n:m"
    rest = {name: value for name, value in config.changed().items() if name not in (*DIRECT, "pattern")}
    return {
        "enabled": True,
        "pattern": PATTERNS[config.pattern],
        "sparse_format": N_M if n_of_m else config.format,
        "sparsity_ratio": 1 - config.n / config.m if n_of_m else config.sparsity_ratio,
        "n": config.n,
        "m": config.m,
        "block_size": config.block_size,
        "metadata": {OWN: rest} if rest else {},
    }


def from_sparse_config(content: Mapping[str, Any]) -> SparsityConfig | None:
    """The configuration of a dictionary; None where it is not enabled.

    Other entries of `metadata` are another's, and are not read.

    Raises:
        InvalidInput: an unknown key or pattern, a format that is none here, or values that contradict one another.
    """
    for key in content:
        if key not in KEYS:
            raise InvalidInput(f"SparseConfig: no key {key!r}{suggestion(str(key), KEYS)} (keys: {', '.join(KEYS)})")
    if not content.get("enabled", True):
        return None
    patterns = {theirs: ours for ours, theirs in PATTERNS.items()}
    pattern = content.get("pattern", PATTERNS["unstructured"])
    if pattern not in patterns:
        raise InvalidInput(
            f"SparseConfig.pattern {pattern!r} is not for weights that stay in place (here: {', '.join(patterns)}); "
            "whole channels and heads are the stages `channels` and `structure` of a recipe"
        )
    given: dict[str, Any] = {"pattern": patterns[pattern]}
    given |= {key: content[key] for key in DIRECT if key in content and _counts(key, given["pattern"])}
    if content.get("sparse_format", N_M) != N_M:
        given["format"] = content["sparse_format"]
    elif "sparse_format" in content and given["pattern"] != "n:m":
        raise InvalidInput(f'SparseConfig.sparse_format "{N_M}" holds semi_structured weights only, not {pattern}')
    own = (content.get("metadata") or {}).get(OWN, {})
    known = set(vars(SparsityConfig())) - {*DIRECT, "pattern"}
    for name in own:
        if name not in known:
            raise InvalidInput(f"SparseConfig.metadata.{OWN}: no field {name!r}{suggestion(str(name), known)}")
    config = SparsityConfig(**{**given, **own})
    meaning.check(config)
    return config


def _counts(key: str, pattern: str) -> bool:
    """Whether a key says something for a pattern: the dictionary always has all of them."""
    return {"n": pattern == "n:m", "m": pattern == "n:m", "block_size": pattern == "block"}.get(key, True)
