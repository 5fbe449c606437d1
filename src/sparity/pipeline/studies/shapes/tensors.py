"""How the tensors of a model follow its sizes: what every shape has in it, without building one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.outline import outlined
from sparity.models.dimensions import CHANNELS, DEPTH
from sparity.pipeline.studies.shapes.axes import Axis

Sizes = Mapping[str, int]  # dimension -> units, of the axes
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Followed:
    """A tensor whose every length is a sum: what it is now, less so much for each unit that is gone.

    Attributes:
        shape: now.
        slopes: axis -> of each length how much goes with one unit.
    """

    shape: Shape
    slopes: Mapping[str, Shape]

    def at(self, gone: Sizes) -> Shape:
        """Its shape when so many units of each axis are gone."""
        return tuple(
            length - sum(slope[place] * gone[name] for name, slope in self.slopes.items())
            for place, length in enumerate(self.shape)
        )


@dataclass(frozen=True)
class Layout:
    """A model's tensors by its sizes.

    Attributes:
        wholes: axis -> its units now.
        depth: blocks.
        itemsize: bytes of a number.
        block: the stored tensors of one block.
        outside: those outside the blocks.
        products: for every input of a block the matrices `[out, in]` that are multiplied by it at once.
        head: the matrix of the head.
    """

    wholes: Sizes
    depth: int
    itemsize: int
    block: tuple[Followed, ...]
    outside: tuple[Followed, ...]
    products: tuple[tuple[Followed, ...], ...]
    head: Followed | None

    def bytes(self, sizes: Sizes) -> int:
        """Of a plain checkpoint of these sizes."""
        gone = self._gone(sizes)
        inside, beside = (sum(prod(each.at(gone)) for each in part) for part in (self.block, self.outside))
        return (sizes.get(DEPTH, self.depth) * inside + beside) * self.itemsize

    def matrices(self, sizes: Sizes) -> list[tuple[int, int]]:
        """`[out, in]` of what one block multiplies, one for each of its inputs."""
        gone = self._gone(sizes)
        found = []
        for product in self.products:
            shapes = [each.at(gone) for each in product]
            found.append((sum(shape[0] for shape in shapes), shapes[0][1]))
        return found

    def head_matrix(self, sizes: Sizes) -> tuple[int, int] | None:
        """`[out, in]` of the head."""
        if self.head is None:
            return None
        rows, columns = self.head.at(self._gone(sizes))
        return rows, columns

    def _gone(self, sizes: Sizes) -> dict[str, int]:
        return {name: whole - sizes[name] for name, whole in self.wholes.items()}


def layout_of(decoder: Decoder, axes: Sequence[Axis]) -> Layout:
    """How a model follows its axes, from its shapes now and with one axis at a time a step smaller."""
    now = one_block(decoder)
    smaller = {axis.name: outlined(now, {axis.name: axis.sizes[0]}, {}) for axis in axes if axis.name != DEPTH}
    gone = {axis.name: axis.whole - axis.sizes[0] for axis in axes if axis.name != DEPTH}

    def follow(shape: Shape, others: Mapping[str, Shape]) -> Followed:
        slopes = {
            name: tuple((a - b) // gone[name] for a, b in zip(shape, other, strict=True))
            for name, other in others.items()
            if other != shape
        }
        return Followed(shape, slopes)

    stored = {name: model.source.shapes() for name, model in smaller.items()}
    inside = f"{now.block_name(0)}."
    every = {
        tensor: follow(shape, {axis: shapes[tensor] for axis, shapes in stored.items()})
        for tensor, shape in now.source.shapes().items()
    }
    sites = {name: model.sites(0) for name, model in smaller.items()}
    products = tuple(
        tuple(
            follow(
                tuple(projection.weight.shape),
                {axis: tuple(other[place].projections[each].weight.shape) for axis, other in sites.items()},
            )
            for each, projection in enumerate(site.projections)
        )
        for place, site in enumerate(now.sites(0))
    )
    head = _head(now)
    heads = {name: _head(model) for name, model in smaller.items()}
    return Layout(
        wholes={axis.name: axis.whole for axis in axes},
        depth=len(decoder),
        itemsize=decoder.dtype.itemsize,
        block=tuple(tensor for name, tensor in every.items() if name.startswith(inside)),
        outside=tuple(tensor for name, tensor in every.items() if not name.startswith(inside)),
        products=products,
        head=None if head is None else follow(head, {name: shape for name, shape in heads.items() if shape}),
    )


def one_block(decoder: Decoder) -> Decoder:
    """The model with its first block alone, in shapes only."""
    return outlined(decoder, {DEPTH: 1}, {}).outlined({})


def _head(model: Decoder) -> Shape | None:
    head = model.skeleton.get_output_embeddings()  # type: ignore[operator]
    return None if head is None else tuple(head.weight.shape)


class Legal:
    """Which sizes a model's configuration can state together, one cut after another as a recipe makes them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = one_block(decoder)
        self._known: dict[tuple[tuple[str, int], ...], bool] = {}

    def __call__(self, sizes: Sizes) -> bool:
        """Whether a model may have these sizes."""
        coupled = tuple((name, size) for name, size in sizes.items() if name not in (DEPTH, CHANNELS))
        if coupled not in self._known:
            self._known[coupled] = self._fits(coupled)
        return self._known[coupled]

    def _fits(self, coupled: tuple[tuple[str, int], ...]) -> bool:
        model = self._decoder
        try:
            for name, size in coupled:
                model = outlined(model, {name: size}, {})
        except InvalidInput:
            return False
        return True
