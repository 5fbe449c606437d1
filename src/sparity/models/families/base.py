"""What a model family tells about itself: where its blocks are and which projections they hold."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from sparity.models.block import InputSite, Projection

GroupLayout = tuple[tuple[str, str], ...]  # the (role, path) pairs that read one input


class Family(ABC):
    """Where one family of architectures keeps its parts. A file per family; the file's name is the `model_type`."""

    name: ClassVar[str]
    blocks: ClassVar[str] = "model.layers"

    @abstractmethod
    def sites(self, block: nn.Module, name: str, config: Any) -> tuple[InputSite, ...]:
        """The input sites of a block in the order of computation; `name` is the block's full name.

        Raises:
            AttributeError: the block does not have this family's shape.
        """


def plain_sites(block: nn.Module, name: str, layout: tuple[GroupLayout, ...]) -> tuple[InputSite, ...]:
    """Sites of a block whose every projection is one `nn.Linear`."""
    sites = []
    for group in layout:
        projections = tuple(Projection(f"{name}.{path}", role, block.get_submodule(path)) for role, path in group)
        sites.append(InputSite(f"{name}.{'_'.join(role for role, _ in group)}", projections))
    return tuple(sites)
