"""What a model family tells about itself: where its blocks are and which projections they hold."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparity import registry
from sparity.models.block import InputSite, Projection

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
    """Where one family of architectures keeps its parts. A file per family; the file's name is the `model_type`."""

    name: ClassVar[str]
    blocks: ClassVar[str] = "model.layers"

    def stored_as(self, name: str, config: Any) -> "str | Fused":
        """How checkpoints keep the parameter that the model in memory calls `name`."""
        return name

    @abstractmethod
    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """The input sites of a block in the order of computation; `name` is the block's full name.

        Raises:
            AttributeError: the block does not have this family's shape.
        """


def family_of(config: Any) -> Family:
    """The family of a model's configuration; Llama's for a `model_type` that none is named after."""
    model_type = str(config.model_type)
    found: Family = registry.get("family", model_type if model_type in registry.names("family") else "llama")()
    return found


def plain_sites(block: nn.Module, name: str, layout: tuple[SiteRoles, ...]) -> tuple[InputSite, ...]:
    """Sites of a block whose every projection is one `nn.Linear`."""
    sites = []
    for group in layout:
        projections = tuple(Projection(f"{name}.{path}", role, block.get_submodule(path)) for role, path in group)
        sites.append(InputSite(f"{name}.{'_'.join(role for role, _ in group)}", projections))
    return tuple(sites)
