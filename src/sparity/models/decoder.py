"""A Hugging Face causal language model, opened so that one block at a time is in memory."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparity import registry
from sparity.checkpoints.shards import LazyTensors
from sparity.checkpoints.source import CheckpointSource, ModuleSource, OutlineSource, Source, main_dtype
from sparity.errors import UnsupportedModel
from sparity.models import transformers as hf
from sparity.models.block import Block, BlockInputs, InputSite
from sparity.models.block_stubs import Recorder, Replay, Stub, Watcher
from sparity.models.dimensions import Dimension
from sparity.models.families.base import Family, family_of
from sparity.models.finite import cast, cast_finite
from sparity.models.packed_layers import check_packed
from sparity.models.ragged import block_config
from sparity.models.size_check import check_sizes
from sparity.models.stored_names import StoredNames
from sparity.models.vocabulary import vocabulary_of
from sparity.visible import logger

log = logger(__name__)


class Decoder:
    """A causal language model as a list of blocks, its weights read from `source` when they are needed.

    `skeleton` is the whole model without memory for its parameters. Nothing here changes the source.
    """

    def __init__(self, skeleton: nn.Module, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.skeleton = skeleton
        self.source = source
        self.device = device
        self.dtype = dtype
        self.config: Any = skeleton.config
        self.family = _family(skeleton)
        self._names = StoredNames(skeleton, source, self.family)
        self._used = self._names.stored()
        check_packed(source, self._used, self.config, self)
        self._warn_of_more_blocks()

    @classmethod
    def open(
        cls, model: str | Path | nn.Module, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
    ) -> "Decoder":
        """Open a folder, a Hugging Face name or a model in memory.

        `dtype` is the type in which weights are held, computed with and exported; "auto" keeps the model's own.

        Raises:
            UnsupportedModel: the architecture has no blocks that Sparity knows.
            CorruptFile: shards are missing, truncated or do not fit the configuration.
        """
        if isinstance(model, nn.Module):
            if not hasattr(model, "config"):
                raise UnsupportedModel(f"{type(model).__name__} has no Hugging Face configuration (`model.config`)")
            config: Any = copy.deepcopy(model.config)
            config.return_dict = True
            source: Source = ModuleSource(model)
        else:
            folder = hf.locate(model)
            config, source = hf.read_config(folder), CheckpointSource(folder)
            check_sizes(folder, config, source.shapes())
        chosen = main_dtype(source) if dtype == "auto" else hf.named_dtype(dtype)
        return cls(hf.empty_model(config, chosen), source, torch.device(device), chosen)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(list(self.skeleton.get_submodule(self.family.blocks).children()))

    def block_name(self, index: int) -> str:
        """The full name of block `index`, such as `model.layers.3`."""
        return f"{self.family.blocks}.{index}"

    def sites(self, index: int) -> tuple[InputSite, ...]:
        """The input sites of a block with their projections' names and shapes, no weights in memory."""
        name = self.block_name(index)
        return self.family.sites(self.skeleton.get_submodule(name), name, block_config(self.config, index))

    def dimensions(self, index: int) -> tuple[Dimension, ...]:
        """What can be cut out of a block, no weights in memory."""
        name = self.block_name(index)
        return self.family.dimensions(self.skeleton.get_submodule(name), name, block_config(self.config, index))

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Load block `index` into memory of its own; it is released when the context closes."""
        name = self.block_name(index)
        module = copy.deepcopy(self.skeleton.get_submodule(name))
        self._fill(module, f"{name}.")
        module.to(self.device)
        block = Block(index, name, module, self.family.sites(module, name, block_config(self.config, index)))
        try:
            yield block
        finally:
            module.to("meta")

    def inputs(self, tokens: Tensor, batch: int = 1, hidden: Tensor | None = None) -> BlockInputs:
        """What the embedding hands to the blocks for `tokens` [samples, length], and every block's other arguments.

        The hidden states are written into `hidden` [samples, length, hidden size] where that is given.

        One pass over the model with stubs in place of its blocks, so that models which give each layer its own mask
        or rotary table are recorded correctly.
        """
        recorder = Recorder(len(self))
        model = self._around_blocks(_base_prefix(self.skeleton), recorder)
        hf.check_vocabulary(tokens, self.config)
        if hidden is None:
            hidden = torch.empty(self.hidden_shape(tokens), dtype=self.dtype, device=self.device)
        with torch.no_grad():
            for start in range(0, len(tokens), batch):
                part = tokens[start : start + batch].to(self.device)
                recorder.begin(len(part))
                model(input_ids=part, use_cache=False)
                hidden[start : start + batch] = recorder.hidden
        return BlockInputs(hidden, recorder.arguments, batch)

    def hidden_shape(self, tokens: Tensor) -> tuple[int, int, int]:
        """`[samples, length, hidden size]` for tokens `[samples, length]`."""
        samples, length = tokens.shape
        return samples, length, int(self.config.hidden_size)

    def head(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Load what follows the blocks, as a differentiable function that gives the model's own logits.

        It takes token ids `[batch, length]` and the last block's outputs `[batch, length, hidden]`.
        """
        return self._behind_blocks("", "logits")

    def tail(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Load what lies between the blocks and the head, such as the last norm; called as `head`."""
        return self._behind_blocks(_base_prefix(self.skeleton), "last_hidden_state")

    def _behind_blocks(self, prefix: str, output: str) -> Callable[[Tensor, Tensor], Tensor]:
        model = self._around_blocks(prefix, replay := Replay())

        def behind(tokens: Tensor, hidden: Tensor) -> Tensor:
            replay.hidden = hidden
            found: Tensor = getattr(model(input_ids=tokens.to(self.device), use_cache=False), output)
            return found

        return behind

    def rest(self) -> Mapping[str, Tensor]:
        """Every stored tensor outside the blocks, under its stored name, in the decoder's dtype, read when asked for.

        Asking raises `NumericalError` for a tensor that the model uses and that holds NaN or infinite numbers.
        """
        outside = self._outside()

        def read(stored: str) -> Tensor:
            name = outside[stored]
            return self._cast(name, self.source.read([name])[name])

        return LazyTensors(outside, read)

    def rest_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `rest` gives."""
        shapes = self.source.shapes()
        return {stored: tuple(shapes[name]) for stored, name in self._outside().items()}

    def _outside(self) -> dict[str, str]:
        """Stored name -> the source's name of every tensor outside the blocks."""
        inside = self._names.stored(tuple(f"{self.block_name(index)}." for index in range(len(self))))
        return {self._names.on_disk(name): name for name in self.source.shapes() if name not in inside}

    def config_changes(self, sizes: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """The attributes of the configuration that other sizes change, with their new values; see `resized`."""
        return self.family.resize(self.config, sizes) if any(sizes) else {}

    def resized(self, sizes: Sequence[Mapping[str, int]]) -> "Decoder":
        """The model with blocks of other sizes, in shapes only: block -> dimension -> new size, others stay.

        Raises:
            InvalidInput: the family's configuration cannot express the sizes.
        """
        return self.outlined(self.config_changes(sizes)) if any(sizes) else self

    def outlined(self, changes: Mapping[str, Any]) -> "Decoder":
        """The model with other values in its configuration, in shapes only; `InvalidInput` where it cannot be."""
        skeleton = hf.empty_model(hf.resized_config(self.config, changes), self.dtype)
        return Decoder(skeleton, OutlineSource(skeleton), self.device, self.dtype)

    def unused(self) -> set[str]:
        """The stored names of tensors that the model has no use for."""
        return self.source.shapes().keys() - self._used

    def stored_names(self, index: int) -> set[str]:
        """The names under which block `index` is stored."""
        return self._names.stored((f"{self.block_name(index)}.",)) & self.source.shapes().keys()

    def linear_weights(self) -> dict[str, bool]:
        """Stored name of each pruned matrix that is stored as a tensor of its own -> whether that is `[in, out]`.

        It is the whole weight of a linear layer, or one matrix of an expert.
        """
        found: dict[str, bool] = {}
        for index in range(len(self)):
            name = self.block_name(index)
            paths = {module: path for path, module in self.skeleton.get_submodule(name).named_modules()}
            here = self.stored_names(index)
            for site in self.sites(index):
                for projection in site.projections:
                    if projection.expert is not None:
                        own = f"{projection.name}.weight"
                        found.update({own: False} if own in here else {})  # absent where experts are stored as one
                        continue
                    path = f"{name}.{paths[projection.module]}.{projection.parameter}"
                    stored = self._names.parts([path])
                    if len(stored) == 1:
                        found[stored[0]] = projection.transposed
        return found

    def vocabulary_weights(self) -> tuple[str, ...]:
        """Stored names of the matrices of the embedding and of the head, one where they are tied.

        Raises:
            InvalidInput: see `vocabulary_of`.
        """
        names = [f"{name}.weight" for name in vocabulary_of(self.skeleton).matrices]
        return tuple(self._names.parts([name for name in names if name in self._names]))

    def export(self, block: Block) -> dict[str, Tensor]:
        """Every stored tensor of a block under its stored name, contiguous and on the CPU."""
        stored: dict[str, Tensor] = {}
        for key, tensor in block.module.state_dict().items():
            name = f"{block.name}.{key}"
            if name in self._names:
                stored.update(self._names.split(name, tensor.detach().cpu().contiguous()))
        return stored

    def _around_blocks(self, prefix: str, watcher: Watcher) -> nn.Module:
        """The part of the model under `prefix`, loaded, with stubs in place of its blocks."""
        model = copy.deepcopy(self.skeleton.get_submodule(prefix.rstrip(".")))
        blocks_path = self.family.blocks.removeprefix(prefix)
        parent, _, last = blocks_path.rpartition(".")
        stubs = [Stub(watcher, i, block) for i, block in enumerate(model.get_submodule(blocks_path).children())]
        setattr(model.get_submodule(parent), last, nn.ModuleList(stubs))
        self._fill(model, prefix, copy=False)
        for name, twin in self.skeleton.all_tied_weights_keys.items():  # type: ignore[union-attr, operator]
            if name.startswith(prefix) and name not in self._names:  # a head that is stored as the embedding
                owner, _, leaf = name.removeprefix(prefix).rpartition(".")
                tied = model.get_parameter(twin.removeprefix(prefix))
                model.get_submodule(owner)._parameters[leaf] = tied
        return model.to(self.device)

    def _warn_of_more_blocks(self) -> None:
        pattern = re.compile(rf"{re.escape(self.family.blocks)}\.(\d+)\.")
        found = {int(match[1]) for name in self.source.shapes() if (match := pattern.match(name))}
        more = sorted(index for index in found if index >= len(self))
        if more:
            log.warning("blocks %s of the checkpoint are not part of the configured model: copied as they are", more)

    def _fill(self, module: nn.Module, prefix: str, copy: bool = True) -> None:
        """Give a module its tensors; without `copy` they may be the source's own, and must not be written to."""
        names = [name for name in module.state_dict() if prefix + name in self._names]
        parts = self._names.parts(prefix + name for name in names)
        tensors = {part: self._cast(part, value) for part, value in self.source.read(parts).items()}
        for name in names:
            owner_path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(owner_path)
            tensor = self._names.join(prefix + name, tensors).to(self.device, copy=copy)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                owner._buffers[leaf] = tensor

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the decoder's dtype, checked to be finite unless the model has no use for it."""
        return cast_finite(name, tensor, self.dtype) if name in self._used else cast(tensor, self.dtype)


def _family(skeleton: nn.Module) -> Family:
    config: Any = skeleton.config
    family = family_of(config)
    try:
        for index in range(max(1, len(list(skeleton.get_submodule(family.blocks).children())))):
            name = f"{family.blocks}.{index}"
            family.sites(skeleton.get_submodule(name), name, block_config(config, index))
    except AttributeError as error:
        raise UnsupportedModel(
            f'the architecture "{config.model_type}" is not supported: it is neither one of '
            f"{', '.join(registry.names('family'))} nor shaped like Llama ({error})"
        ) from error
    return family


def _base_prefix(skeleton: nn.Module) -> str:
    """`model.` or `transformer.`: where the model without its head lies, which some checkpoints leave out."""
    return f"{skeleton.base_model_prefix}."
