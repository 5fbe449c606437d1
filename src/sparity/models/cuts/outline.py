"""A model of smaller sizes, in shapes only: what a cut will leave, before any is made."""

from collections.abc import Mapping
from typing import Any

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.block import Block
from sparity.models.cuts.depth import depth_changes
from sparity.models.cuts.experts import COUNTS, top_k
from sparity.models.cuts.hidden import declines_hidden
from sparity.models.dimensions import DEPTH, EXPERTS, HIDDEN, QUERY_HEADS
from sparity.models.ragged import is_ragged


def outlined(model: Decoder, sizes: Mapping[str, int], changes: Mapping[str, Any]) -> Decoder:
    """The model when each named dimension of every block, or of the model, has a new size.

    Args:
        model: as it is, perhaps of shapes only.
        sizes: dimension -> how many units stay.
        changes: further attributes of the configuration.

    Raises:
        InvalidInput: sizes that no configuration of the model's kind can state, or that the model cannot have.
    """
    config, depth = model.config, len(model)
    if sizes and is_ragged(config):
        model.config_changes([dict(sizes)] * depth)  # refuses it
    known = [_offered(model, index) for index in range(depth)]
    blocks = [{name: size for name, size in sizes.items() if name in names} for names in known]
    missing = [name for name in sizes if name not in (HIDDEN, DEPTH, EXPERTS) and not any(name in b for b in blocks)]
    if missing:
        raise InvalidInput(f'this model has no "{missing[0]}" that could be cut')
    found = {**model.config_changes(blocks)}
    if EXPERTS in sizes:
        if sizes[EXPERTS] < top_k(config):
            raise InvalidInput(
                f"experts: {sizes[EXPERTS]} would be left, but every token visits {top_k(config)}: lower the sparsity"
            )
        found |= {name: sizes[EXPERTS] for name in COUNTS if hasattr(config, name)}
    if HIDDEN in sizes and sizes[HIDDEN] != int(config.hidden_size):
        if reason := declines_hidden(model.skeleton, model.family, _blocks(model)):
            raise InvalidInput(f"{HIDDEN}: {reason}: cut other dimensions")
        found |= {"hidden_size": sizes[HIDDEN], "head_dim": model.family.head_width(config)}
    if DEPTH in sizes and sizes[DEPTH] != depth:
        found |= depth_changes(config, model.family, list(range(sizes[DEPTH])))
    found |= changes
    return model.outlined(found) if found else model


def _offered(model: Decoder, index: int) -> set[str]:
    name = model.block_name(index)
    heads = model.family.query_heads(model.skeleton.get_submodule(name), name, model.config)
    return {dimension.name for dimension in model.dimensions(index)} | ({QUERY_HEADS} if heads else set())


def _blocks(model: Decoder) -> list[Block]:
    names = [model.block_name(index) for index in range(len(model))]
    return [Block(i, n, model.skeleton.get_submodule(n), model.sites(i)) for i, n in enumerate(names)]
