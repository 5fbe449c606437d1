"""What a model family tells about itself: where its blocks are, which projections they hold and how they can shrink."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparity import registry
from sparity.errors import InvalidInput
from sparity.models.block import InputSite, Projection
from sparity.models.dimensions import (
    CHANNELS,
    KV_GROUPS,
    QUERY_HEADS,
    Dimension,
    bystanders,
    channel_dimensions,
    head_dimension,
    query_head_dimension,
)
from sparity.models.ragged import is_ragged
from sparity.models.transformers import resized_config

SiteRoles = tuple[tuple[str, str], ...]  # the (role, path) pairs that read one input


@dataclass(frozen=True)
class Fused:
    """A three-dimensional parameter `[experts, out, in]` whose checkpoints keep each expert's matrices apart.

    `names[e]` lists the stored matrices of expert `e`, which follow one another along its outputs.
    """

    names: tuple[tuple[str, ...], ...]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter from its stored matrices."""
        return torch.stack([torch.cat([tensors[name] for name in expert]) for expert in self.names])

    def split(self, parameter: Tensor) -> dict[str, Tensor]:
        """The stored matrices of the parameter; those of one expert are equally tall."""
        return {
            name: part.contiguous()
            for expert, matrix in zip(self.names, parameter, strict=True)
            for name, part in zip(expert, matrix.chunk(len(expert)), strict=True)
        }


class Family(ABC):
    """Where one family of architectures keeps its parts. A file per family; the file's name is the `model_type`.

    `channels` and `expert_channels` name the configuration's attributes for the width of an MLP and of an expert;
    `takes_head_width` says that the model uses the configuration's `head_dim` where there is one.
    """

    name: ClassVar[str]
    blocks: ClassVar[str] = "model.layers"
    channels: ClassVar[str] = "intermediate_size"
    expert_channels: ClassVar[str] = "intermediate_size"
    takes_head_width: ClassVar[bool] = True

    def stored_as(self, name: str, config: Any) -> "str | Fused":
        """How checkpoints keep the parameter that the model in memory calls `name`."""
        return name

    @abstractmethod
    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """The input sites of a block in the order of computation; `name` is the block's full name.

        Raises:
            AttributeError: the block does not have this family's shape.
        """

    def experts(self, config: Any, index: int) -> int:
        """The number of experts of block `index`; 0 for a dense MLP."""
        return 0

    def head_width(self, config: Any) -> int:
        """The numbers of one attention head."""
        stated = getattr(config, "head_dim", None) if self.takes_head_width else None
        return int(stated or config.hidden_size // config.num_attention_heads)

    def dimensions(self, block: nn.Module, name: str, config: Any) -> tuple[Dimension, ...]:
        """What can be cut out of a block, its weights loaded or not: MLP channels first, then heads.

        A dimension says what belongs together; whether the configuration can express a smaller one, `resize` says.
        """
        projections = [projection for site in self.sites(block, name, config) for projection in site.projections]
        width = self.head_width(config)
        found = list(channel_dimensions(projections))
        heads = head_dimension(projections, width)
        if heads is not None and all(p.numel() in (1, width) for p in bystanders(block, projections, heads)):
            found.append(heads)  # a norm over one head's width is the same for every head
        return tuple(
            dimension
            for dimension in found
            if dimension is heads or all(p.numel() == 1 for p in bystanders(block, projections, dimension))
        )

    def query_heads(self, block: nn.Module, name: str, config: Any) -> Dimension | None:
        """The query heads that share key-value heads, as a dimension of their own; None where none are shared."""
        projections = [projection for site in self.sites(block, name, config) for projection in site.projections]
        groups = next((found for found in self.dimensions(block, name, config) if found.name == KV_GROUPS), None)
        return query_head_dimension(projections, groups, self.head_width(config)) if groups else None

    def resize(self, config: Any, sizes: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """The configuration's attributes that change when its blocks get these sizes, with their new values.

        `sizes[i]` maps names of dimensions of block `i` to their new sizes; a missing one keeps its size. Nothing
        changes: an empty dictionary. With fewer heads, `head_dim` is among the attributes, so that it is written down.

        Raises:
            InvalidInput: no such dimension or size, or what the configuration cannot express: blocks of different
                sizes, experts of different sizes, heads whose width it derives from their number.
        """
        if len(sizes) != config.num_hidden_layers:
            raise InvalidInput(
                f"sizes are given for {len(sizes)} blocks, but the model has {config.num_hidden_layers}: "
                "give one entry per block, an empty one for a block that stays"
            )
        if not any(sizes):
            return {}
        if is_ragged(config):
            raise InvalidInput(
                "the blocks of this model have different sizes already: put all that cuts channels, heads or blocks "
                "before the stage that makes them differ"
            )
        return self._changes(config, [self._widths(config, index, block) for index, block in enumerate(sizes)])

    def resize_block(self, config: Any, index: int, sizes: Mapping[str, int], check: bool = True) -> dict[str, Any]:
        """As `resize`, when every block that shares an attribute with block `index` gets that block's sizes.

        Without `check` transformers is not asked whether it takes the values.
        """
        if not sizes:
            return {}
        widths = self._widths(config, index, sizes)
        return self._changes(config, [widths] * int(config.num_hidden_layers), check)

    def declines(self, config: Any, dimension: str) -> str | None:
        """Why no configuration of this kind can express fewer units of a dimension; None where one can."""
        if dimension not in (KV_GROUPS, QUERY_HEADS) or (self.takes_head_width and hasattr(config, "head_dim")):
            return None
        return (
            f'a configuration of type "{config.model_type}" cannot say how wide a head is (no head_dim): with fewer '
            f"heads, each would be taken for a wider one; cut {CHANNELS} instead"
        )

    def _width(self, config: Any, attribute: str, index: int) -> int:
        """The value of a size in the configuration for block `index`; some configurations list one per block."""
        value = getattr(config, attribute, None)
        if value is None:
            raise InvalidInput(
                f'a configuration of type "{config.model_type}" does not state {attribute}: keep all sizes'
            )
        return int(value[index] if isinstance(value, list | tuple) else value)

    def _widths(self, config: Any, index: int, sizes: Mapping[str, int]) -> dict[str, int]:
        """Every size attribute that block `index` reads, with its new value."""
        experts = self.experts(config, index)
        attribute = self.expert_channels if experts else self.channels
        channels = dict.fromkeys(
            [f"{CHANNELS}.{expert}" for expert in range(experts)] or [CHANNELS], self._width(config, attribute, index)
        )
        heads = self._width(config, "num_attention_heads", index)
        grouped = getattr(config, "num_key_value_heads", None) is not None
        key_heads = self._width(config, "num_key_value_heads", index) if grouped else heads
        offered = {QUERY_HEADS: heads} if key_heads == heads else {KV_GROUPS: key_heads, QUERY_HEADS: heads}
        new = _resized({**channels, **offered}, sizes, index)
        new_heads, new_key_heads = self._heads(config, offered, new, index)
        if len({new[name] for name in channels}) > 1:
            raise InvalidInput(
                f"block {index}: its experts would have {', '.join(str(new[name]) for name in channels)} channels, but "
                f'a configuration of type "{config.model_type}" holds one {attribute} for all: keep equally many'
            )
        widths = {attribute: new[next(iter(channels))], "num_attention_heads": new_heads}
        return {**widths, "num_key_value_heads": new_key_heads} if grouped else widths

    def _heads(self, config: Any, old: Mapping[str, int], new: Mapping[str, int], index: int) -> tuple[int, int]:
        """How many query heads and key-value heads are left."""
        groups = old.get(KV_GROUPS)
        changed = [name for name in old if new[name] != old[name]]
        for name in changed:
            if reason := self.declines(config, name):
                raise InvalidInput(f"block {index}, {name}: {reason}")
        if groups is None:
            return new[QUERY_HEADS], new[QUERY_HEADS]
        if len(changed) == 2:
            raise InvalidInput(
                f"block {index}: {KV_GROUPS} take their query heads with them: cut {QUERY_HEADS} before or afterwards"
            )
        if new[QUERY_HEADS] % groups:
            raise InvalidInput(
                f"block {index}, {QUERY_HEADS}: {new[QUERY_HEADS]} query heads cannot be shared out equally among "
                f"{groups} key-value heads: keep equally many of each"
            )
        return new[QUERY_HEADS] * new[KV_GROUPS] // groups, new[KV_GROUPS]

    def _changes(self, config: Any, blocks: Sequence[Mapping[str, int]], check: bool = True) -> dict[str, Any]:
        """The attributes that differ from the configuration's, from those of every block."""
        changes: dict[str, Any] = {}
        for attribute in dict.fromkeys(attribute for block in blocks for attribute in block):
            before = {i: self._width(config, attribute, i) for i, block in enumerate(blocks) if attribute in block}
            after = {i: blocks[i][attribute] for i in before}
            if after == before:
                continue
            listed = getattr(config, attribute)
            if isinstance(listed, list | tuple):
                changes[attribute] = [after.get(i, width) for i, width in enumerate(listed)]
                continue
            if len(set(after.values())) > 1:
                raise InvalidInput(_different(config, attribute, after))
            changes[attribute] = next(iter(after.values()))
        if "num_attention_heads" in changes:
            changes["head_dim"] = self.head_width(config)
        if check:
            resized_config(config, changes)  # which transformers may refuse
        return changes


def family_of(config: Any) -> Family:
    """The family of a model's configuration; Llama's for a `model_type` that none is named after."""
    model_type = str(config.model_type)
    found: Family = registry.get("family", model_type if model_type in registry.names("family") else "llama")()
    return found


def _resized(old: Mapping[str, int], new: Mapping[str, int], index: int) -> dict[str, int]:
    """The sizes of a block's dimensions with those in `new` in place of the old ones."""
    for name, size in new.items():
        if name not in old:
            why = {
                KV_GROUPS: ": every query head has a key-value head of its own, and goes with it",
            }.get(name, "")
            raise InvalidInput(f'block {index} has no dimension "{name}"{why}; it has {", ".join(old)}')
        if not 1 <= size <= old[name]:
            raise InvalidInput(f"block {index}, {name}: a new size lies between 1 and {old[name]}, not {size}")
    return {**old, **new}


def _different(config: Any, attribute: str, after: Mapping[int, int]) -> str:
    """What to do about blocks of different sizes."""
    by_width: dict[int, list[int]] = {}
    for index, width in after.items():
        by_width.setdefault(width, []).append(index)
    blocks = "; ".join(f"{width} in blocks {', '.join(map(str, found))}" for width, found in by_width.items())
    return (
        f"{attribute} would be {blocks}, but a configuration of type "
        f'"{config.model_type}" holds one value for all: keep as many in each of these blocks'
    )


def plain_sites(block: nn.Module, name: str, layout: tuple[SiteRoles, ...]) -> tuple[InputSite, ...]:
    """Sites of a block whose every projection is one `nn.Linear`."""
    sites = []
    for group in layout:
        projections = tuple(Projection(f"{name}.{path}", role, block.get_submodule(path)) for role, path in group)
        sites.append(InputSite(f"{name}.{'_'.join(role for role, _ in group)}", projections))
    return tuple(sites)
