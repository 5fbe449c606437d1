"""A stage applied to some projections of a block for a while; what it made of each is kept."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from sparity.calibration.evidence import BlockEvidence
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.stages.base import Stage
from sparity.stages.kinds import BlockStage, RuntimeStage

CACHE_BYTES = 1 << 30  # of what stays in memory, so that it need not be made again


class Kept:
    """Tensors by name, by what they were made for; the oldest go when they are too many."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, Mapping[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: Hashable) -> Mapping[str, Tensor] | None:
        """What was kept, or None."""
        return self._found.get(key)

    def keep(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; at least these."""
        self._found[key] = tensors
        self._bytes += _bytes(tensors)
        while self._bytes > CACHE_BYTES and len(self._found) > 1:
            self._bytes -= _bytes(self._found.popitem(last=False)[1])


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class Applied:
    """Applies a stage to a block of a model. `known` gives the evidence of a block of the model as it is."""

    def __init__(self, decoder: Decoder, stage: Stage, known: Callable[[Block], BlockEvidence]) -> None:
        self._decoder, self._stage, self._known = decoder, stage, known
        self.kept = Kept()
        self._last: tuple[int, BlockEvidence] | None = None  # of the block that was fitted last

    @contextmanager
    def on(self, block: Block, changed: Mapping[str, float]) -> Iterator[None]:
        """The stage applied to those projections of a block that are changed, within the context.

        Raises:
            InvalidInput: the stage changes shapes, or trains the whole model.
        """
        here = {p.name: changed[p.name] for p in block.projections if p.name in changed}
        if not here:
            yield
        elif isinstance(self._stage, RuntimeStage):
            with self._stage.attach(block.module, block.sites, self._fitted(self._stage, block, here)):
                yield
        elif isinstance(self._stage, BlockStage):
            with self._edited(self._stage, block, here):
                yield
        else:
            raise InvalidInput(f"{self._stage.name} trains the whole model: its parts cannot be measured one by one")

    def _fitted(self, stage: RuntimeStage, block: Block, here: Mapping[str, float]) -> Mapping[str, Tensor]:
        """The data of a block, each projection's as it is when it alone is changed: see `RuntimeStage.fit`."""
        data = dict(self._fit_of(stage, block, {}))
        for name, share in here.items():
            found = self._fit_of(stage, block, {name: share})
            data.update({key: tensor for key, tensor in found.items() if key.rpartition(".")[0] == name})
        return data

    def _fit_of(self, stage: RuntimeStage, block: Block, share: Mapping[str, float]) -> Mapping[str, Tensor]:
        key = (block.index, *share.items())
        found = self.kept.get(key)
        if found is None:
            if self._last is None or self._last[0] != block.index:
                sites = list(self._known(block).sites())
                self._last = block.index, replace(self._known(block), gathered=lambda: iter(sites))
            evidence = replace(self._last[1], block=block)
            found = stage.fit(self._decoder, evidence, {"sparsity": dict(share)}).tensors
            self.kept.keep(key, found)
        return found

    @contextmanager
    def _edited(self, stage: BlockStage, block: Block, here: Mapping[str, float]) -> Iterator[None]:
        projections = {p.name: p for p in block.projections if p.name in here}
        before = {name: projection.weight.clone() for name, projection in projections.items()}
        known = {name: self.kept.get((name, share)) for name, share in here.items()}
        new = {name: here[name] for name, found in known.items() if found is None}
        if new:
            stage.edit(self._decoder, self._known(with_sites_of(block, new)), {"sparsity": new})
            made = {name: projections[name].weight.clone() for name in new}
            if any(made[name].shape != before[name].shape for name in new):
                raise InvalidInput(f"{stage.name} changes shapes: its parts cannot be measured one by one")
        for name, found in known.items():
            if found is not None:
                projections[name].write(found["weight"])
        for name in new:
            self.kept.keep((name, here[name]), {"weight": made[name]})
        try:
            yield
        finally:
            for name, projection in projections.items():
                projection.write(before[name])


def with_sites_of(block: Block, names: Collection[str]) -> Block:
    """The block with those input sites only that hold one of the projections: what is known of others is not read."""
    sites = tuple(site for site in block.sites if any(projection.name in names for projection in site.projections))
    return replace(block, sites=sites)
