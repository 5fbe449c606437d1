"""The parts of a model that get one choice each: projections that read the same input."""

from dataclasses import dataclass

from sparity.models import Decoder, InputSite
from sparity.models.model_parts import visited


@dataclass(frozen=True)
class Unit:
    """What is decided together, in one block.

    Attributes:
        name: of its block and roles, such as `model.layers.3: q, k, v`.
        block: its block's number.
        role: the roles of its projections in words; the same in every block that has them.
        projections: their names.
        matrices: `[rows, columns]` of each.
        visits: how many of its matrices a token passes through, as a share: 1, or of experts what a router chooses.
        products: the names of what is multiplied at once: projections with the same input, one expert's.
    """

    name: str
    block: int
    role: str
    projections: tuple[str, ...]
    matrices: tuple[tuple[int, int], ...]
    visits: float
    products: tuple[tuple[str, ...], ...]


def units_of(decoder: Decoder) -> list[Unit]:
    """Every unit, in the order of computation; experts of a block move together."""
    return [unit for index in range(len(decoder)) for unit in _of_block(decoder, index)]


def _of_block(decoder: Decoder, index: int) -> list[Unit]:
    alike: dict[str, list[InputSite]] = {}
    for site in decoder.sites(index):
        alike.setdefault(", ".join(projection.role for projection in site.projections), []).append(site)
    found = []
    for role, sites in alike.items():
        every = [projection for site in sites for projection in site.projections]
        found.append(
            Unit(
                name=f"{decoder.block_name(index)}: {role}",
                block=index,
                role=role,
                projections=tuple(projection.name for projection in every),
                matrices=tuple((projection.weight.shape[0], projection.weight.shape[1]) for projection in every),
                visits=visited(decoder, every[0]),
                products=tuple(tuple(projection.name for projection in site.projections) for site in sites),
            )
        )
    return found
