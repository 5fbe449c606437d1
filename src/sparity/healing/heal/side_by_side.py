"""The sparse model and the dense one, walked through together: what each block of both is given, on the same text."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.healing.heal.methods.base import Task
from sparity.models import Block, BlockInputs, Decoder, InputSite
from sparity.models.block import Projection
from sparity.models.families.base import family_of
from sparity.products.float32 import float32_products

See = Callable[[Tensor, Mapping[str, Tensor]], None]
EVERY = 4  # blocks between two checkpoints


@dataclass
class Side:
    """One of the two models: its blocks, and the hidden states `[samples, tokens, hidden]` before one of them."""

    decoder: Decoder
    model: nn.Module
    inputs: BlockInputs
    hidden: Tensor
    reached: int = 0

    @classmethod
    def of(cls, model: nn.Module, tokens: Tensor) -> "Side":
        """A model before its first block."""
        parameter = next(model.parameters())
        decoder = Decoder.open(model, parameter.device, parameter.dtype)
        inputs = decoder.inputs(tokens, 1)
        return cls(decoder, model, inputs, inputs.hidden)

    def block(self, index: int) -> Block:
        """A block of the model itself: edits change the model."""
        return own_block(self.decoder, self.model, index)

    def go_to(self, index: int) -> None:
        """Carry the hidden states to the inputs of a block."""
        for passed in range(self.reached, index):
            self.block(passed).run(self.inputs, self.hidden, into=self.hidden)
        self.reached = max(self.reached, index)

    def forward(self, index: int, sample: int) -> Tensor:
        """What a block gives for one sequence, `[1, tokens, hidden]`."""
        with torch.no_grad(), float32_products():
            return self.block(index).output(self.inputs, self.hidden[sample : sample + 1])


@dataclass(frozen=True)
class Pair:
    """A block of the sparse model and the one that it was in the dense model, each with its inputs."""

    sparse: Side
    dense: Side
    index: int
    origin: int

    @property
    def block(self) -> Block:
        """The sparse one, as it is now."""
        return self.sparse.block(self.index)

    def twin(self, projection: Projection) -> Projection | None:
        """The same projection of the dense model; None where that has none of this name, or one of another shape.

        Only the inputs of a layer may be fewer: what it gives is known all the same. Of experts there must be as many,
        or their numbers would mean others.
        """
        old, new = f"{self.sparse.decoder.block_name(self.index)}.", f"{self.dense.decoder.block_name(self.origin)}."
        name = projection.name.replace(old, new, 1)
        found = next((each for each in self.dense.block(self.origin).projections if each.name == name), None)
        if found is None or len(found.weight) != len(projection.weight):
            return None
        return None if found.expert is not None and found.stored.shape != projection.stored.shape else found

    def watch(self, site: InputSite, twins: Mapping[str, Projection], see: See) -> None:
        """Show for every sequence what a site reads, `[tokens, in]`, and what its projections give in the dense model.

        `twins` names the projections of the dense model by those of the sparse one, `[tokens, out]` each. The blocks
        are run as they are now.
        """
        seen: list[Tensor] = []
        given: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            hooks.enter_context(site.watch(seen.append))
            for name, twin in twins.items():
                hooks.callback(twin.module.register_forward_hook(_noting(given, name, twin)).remove)
            for sample in range(len(self.sparse.hidden)):
                self.sparse.forward(self.index, sample)
                if twins:
                    self.dense.forward(self.origin, sample)
                see(torch.cat(seen).float(), given)
                seen.clear()
                given.clear()


def pairs(task: Task, start: int = 0) -> Iterator[Pair]:
    """Every block of the sparse model beside its own in the dense one, in order; edits reach the blocks that follow.

    Args:
        task: what is healed.
        start: the first block; those before it are as they will be.

    Raises:
        InvalidInput: the models cannot be compared block by block.
    """
    if not task.blocks or max(task.blocks) >= len(Decoder.open(task.dense)):
        raise InvalidInput(
            "heal: which of the teacher's blocks each block of the model was is not known: cut and heal in one recipe, "
            "or use distillation or finetune, which do not compare blocks"
        )
    sparse, dense = Side.of(task.model, task.tokens), Side.of(task.dense, task.tokens)
    for index in range(start, len(sparse.decoder)):
        sparse.go_to(index)
        dense.go_to(task.blocks[index])
        yield Pair(sparse, dense, index, task.blocks[index])


def own_block(decoder: Decoder, model: nn.Module, index: int) -> Block:
    """A block of a model in memory, none of its copy: edits change the model."""
    name = decoder.block_name(index)
    module = model.get_submodule(name)
    return Block(index, name, module, decoder.family.sites(module, name, decoder.config))


def keep(task: Task, done: int, beside: Mapping[str, Tensor], weights: bool = True) -> None:
    """Keep the weights of the blocks, of which `done` are healed, and other tensors, where it is time to.

    Without `weights` they are what they were.
    """
    total = len(task.blocks)
    if done % EVERY == 0 or done == total:
        changed = {f"weight.{name}": tensor for name, tensor in _stored(task.model).items()} if weights else {}
        task.work.save(done, {name: tensor.contiguous() for name, tensor in {**changed, **beside}.items()})
    task.work.progress(done, total)


def restore(task: Task) -> tuple[int, dict[str, Tensor]]:
    """How many blocks were healed when the last checkpoint was kept, and what was kept beside the weights."""
    last = task.work.last()
    if last is None:
        return 0, {}
    done, tensors = last
    for name, tensor in _stored(task.model).items():
        if (kept := tensors.pop(f"weight.{name}", None)) is not None:
            tensor.copy_(kept)
    return done, tensors


def _stored(model: Any) -> dict[str, Tensor]:
    """The parameters of the blocks."""
    prefix = f"{family_of(model.config).blocks}."
    return {name: parameter.data for name, parameter in model.named_parameters() if name.startswith(prefix)}


def _noting(given: dict[str, Tensor], name: str, twin: Projection) -> Callable[..., None]:
    def note(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        rows = output if twin.rows is None else output[..., slice(*twin.rows)]
        given[name] = rows.reshape(-1, rows.shape[-1]).float()

    return note
