"""Cut a whole model in memory: any of its dimensions, each block as its own choice says."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from sparity.errors import InvalidInput, SparityError, UnsupportedModel
from sparity.models import transformers as hf
from sparity.models.block import Block
from sparity.models.cuts.depth import cut_depth, silence_attention
from sparity.models.cuts.experts import cut_experts
from sparity.models.cuts.hidden import cut_hidden
from sparity.models.cuts.kept_units import ATTENTION, Kept
from sparity.models.cutting import cut_block
from sparity.models.dimensions import DEPTH, EXPERTS, HIDDEN, Dimension, check_kept
from sparity.models.families.base import Family, family_of
from sparity.models.ragged import (
    block_config,
    held_config,
    is_ragged,
    keep_config,
    plain_config,
    ragged_config,
    stated_sizes,
)


def cut_model(model: nn.Module, kept: Mapping[str, Any] | Kept) -> nn.Module:
    """A copy of a model with only the kept units, as `sparity.cut`.

    Raises:
        InvalidInput: indices that choose no units of the model, or what no model of its kind can be.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModel(f"{type(model).__name__} has no Hugging Face configuration (`model.config`)")
    family, total = family_of(config), int(config.num_hidden_layers)
    wanted = kept if isinstance(kept, Kept) else Kept.read(kept, total)
    _check(wanted, config, total)
    smaller = copy.deepcopy(model)
    blocks = blocks_of(smaller, family)
    for index, block in enumerate(blocks):
        if wanted.blocks[index]:
            blocks[index] = cut_block(block, wanted.blocks[index], family, block_config(config, index), check=False)
        if wanted.attention is not None and index not in wanted.attention.tolist():
            silence_attention(blocks[index])
    changes = _stated(family, config, [{name: len(u) for name, u in block.items()} for block in wanted.blocks])
    changes |= _cut_experts(blocks, wanted, family, config)
    if wanted.hidden is not None and len(wanted.hidden) < int(config.hidden_size):
        changes |= cut_hidden(smaller, family, blocks, wanted.hidden)
    if wanted.depth is not None and len(wanted.depth) < total:
        changes |= cut_depth(smaller, family, wanted.depth)
    with_config(smaller, family, changes)
    return smaller


def with_config(model: nn.Module, family: Family, changes: Mapping[str, Any]) -> None:
    """Write attributes into the configuration of a model and of its parts."""
    _share_config(model, family, hf.resized_config(model.config, changes, check=False), set(changes))


def _check(wanted: Kept, config: Any, total: int) -> None:
    sizes = {HIDDEN: int(config.hidden_size), DEPTH: total, ATTENTION: total}
    for name, units in ((HIDDEN, wanted.hidden), (DEPTH, wanted.depth), (ATTENTION, wanted.attention)):
        if units is not None and (name != ATTENTION or len(units)):
            check_kept([Dimension(name, sizes[name], ())], {name: units}, "the model")


def _cut_experts(blocks: list[Block], wanted: Kept, family: Family, config: Any) -> dict[str, Any]:
    """Cut the experts of every block that chooses some; what the configuration says of equally many."""
    changes: list[dict[str, Any]] = []
    for index, units in enumerate(wanted.experts):
        block, size = blocks[index], family.experts(config, index)
        if units is None:
            changes += [{}] if size else []
            continue
        if not size:
            raise InvalidInput(f"{block.name} has no experts that could be cut")
        check_kept([Dimension(EXPERTS, size, ())], {EXPERTS: units}, block.name)
        changes.append(cut_experts(block, units, config))
        sites = family.sites(block.module, block.name, own_config(block.module, config))
        blocks[index] = replace(block, sites=sites)
    return changes[0] if changes and all(each == changes[0] for each in changes) else {}


def blocks_of(model: nn.Module, family: Family) -> list[Block]:
    """The blocks of a model in memory; what is written into them changes it."""
    config: Any = model.config
    modules = model.get_submodule(family.blocks).children()
    names = [f"{family.blocks}.{index}" for index in range(len(list(modules)))]
    found = []
    for index, name in enumerate(names):
        module = model.get_submodule(name)
        found.append(Block(index, name, module, family.sites(module, name, own_config(module, config))))
    return found


def own_config(block: nn.Module, config: Any) -> Any:
    """The configuration that fits a block: what one of its modules holds, else the model's."""
    return next((module.config for module in block.modules() if "config" in module.__dict__), config)


def stock_problem(model: nn.Module) -> str | None:
    """Why the configuration of a model does not say what it is, so that no stock loader would open it; None if it does.

    Attention that was silenced is zeros in a shape that every loader knows.
    """
    return _unsaid(model, plain_config(model.config))


def ragged_problem(model: nn.Module) -> str | None:
    """As `stock_problem`, where blocks may have the sizes that the configuration gives each of its own."""
    return _unsaid(model, model.config)


def _unsaid(model: nn.Module, config: Any) -> str | None:
    try:
        hf.resized_config(config, {"hidden_size": config.hidden_size})
        outline = hf.outline_model(config)
    except SparityError as error:
        return str(error)
    wanted = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            said = list(wanted[name]) if name in wanted else "no such tensor"
            is_ = list(found[name]) if name in found else "missing"
            return f"{name} is {is_}, but the configuration says {said}"
    return None


def _stated(family: Family, config: Any, sizes: list[dict[str, int]]) -> dict[str, Any]:
    """The configuration's attributes for blocks of new sizes: none of those in which the blocks differ."""
    kinds = {name.partition(".")[0] for block in sizes for name in block}
    changes: dict[str, Any] = {}
    for kind in sorted(kinds):
        alone = [{n: size for n, size in block.items() if n.partition(".")[0] == kind} for block in sizes]
        try:
            changes |= family.resize(config, alone)
        except InvalidInput:  # blocks differ: their own modules know, and `stock_problem` says it to whoever saves them
            continue
    return changes


def _share_config(model: nn.Module, family: Family, config: Any, agreed: set[str]) -> None:
    """Give the model its new configuration, which states what is `agreed` for all blocks.

    Where blocks differ in another size, it says so, and each block has its own.
    """
    blocks = list(model.get_submodule(family.blocks).children())
    differing = [name for name in stated_sizes(config) if name not in agreed]
    sizes = [{name: getattr(own_config(block, config), name) for name in differing} for block in blocks]
    config = ragged_config(config, sizes)
    if is_ragged(config):
        for index, block in enumerate(blocks):
            keep_config(block, held_config(config, index), ())
        keep_config(model, config, blocks)
        return
    keep_config(model, config, ())
