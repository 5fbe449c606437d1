"""A transformers model on the engine: weights packed, decoding on the fast path; `generate` stays transformers' own."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparity.engine.decoding.model import disable_fast_path, enable_fast_path, has_fast_path
from sparity.engine.kernels.fastest import fastest_format
from sparity.engine.kernels.smallest import smallest_format
from sparity.engine.modules.by_channel import laid_out, pays, skip_before
from sparity.engine.modules.embedding import FORMAT, PackedEmbedding, PackedHead
from sparity.engine.modules.experts import PackedExperts
from sparity.engine.modules.linear import DenseLinear, PackedLinear
from sparity.engine.modules.module_swap import Swap
from sparity.engine.modules.packed_module import HoldsPacked
from sparity.engine.modules.skips import InputSkip
from sparity.engine.saving import save_packed, save_plain
from sparity.errors import InvalidInput, wrong_input
from sparity.formats import Encoding, EncodingSpec, Format, Packed, build_encoding, build_format
from sparity.models.experts import ExpertNames, expert_matrices, experts_of
from sparity.models.vocabulary import forget_ties, recall_ties, vocabulary_of

Form = str | Mapping[str, Any]  # a name, or {name: {option: value}}


@wrong_input()
def attach(
    model: Any, form: Form = "smallest", values: EncodingSpec = "same", embeddings: EncodingSpec = "same"
) -> Any:
    """Run a causal language model on the engine, in place; the model is returned.

    Every linear layer and every expert of the blocks is packed, and its dense weight is let go; the embedding and the
    head stay dense unless `embeddings` says otherwise.
    Outputs are those of the model up to rounding. `generate` and all its options are transformers' own; see
    `decoding.model` for what is faster and when.

    Args:
        model: from transformers, on the CPU, in bfloat16. Layers that are packed already stay as they are, but for the
            layout of dense ones behind skipped channels.
        form: of the formats that can hold a matrix's zeros the "smallest", or the "fastest", which is timed (dense
            where dense is); or one format for all of them, by its name or as {name: {option: value}}. With both of the
            first, a dense matrix behind skipped input channels, at least 10 % of them (65 % in int4), is laid out by
            channel (`columns`).
        values: the encoding of the packed weights: "same", or one that quantises, such as "int8": then outputs change.
        embeddings: the encoding of the embedding and of the head, which stay one matrix where they are tied.

    Raises:
        InvalidInput: another type or device, no such format or encoding, a matrix whose zeros the format cannot hold,
            or an embedding that does more than to look rows up. The model is then what it was; only with quantised
            values, what was packed before stays packed.

    Example:
        >>> import sparity, torch
        >>> model = sparity.attach(sparity.load("zoo:llama", dtype="bfloat16"), form="bitmask")
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'PackedLinear'
        >>> model.generate(torch.tensor([[5, 6, 7]]), min_new_tokens=4, max_new_tokens=4).shape
        torch.Size([1, 7])
    """
    _check(model)
    encoding = build_encoding(values)
    before, swaps = has_fast_path(model), list[Swap]()
    try:
        for swap in _vocabulary_swaps(model, build_encoding(embeddings)):
            swap.put()
            swap.let_go()
        for swap in _swaps(model, form, encoding):
            if encoding.exact:
                swaps.append(swap)
            swap.put()
            swap.let_go()
    except BaseException:
        for swap in swaps:
            swap.undo()
        if before or any(isinstance(module, HoldsPacked) for module in model.modules()):
            save_packed(enable_fast_path(model))
        raise
    save_packed(model)
    return enable_fast_path(model)


@contextmanager
def attached(
    model: Any, form: Form = "smallest", values: EncodingSpec = "same", embeddings: EncodingSpec = "same"
) -> Iterator[Any]:
    """`attach` within the context; then every layer is what it was, with the same parameters, bit for bit.

    Only with quantised values the dense weights stay in memory meanwhile. A model that was on the engine before stays
    there.

    Example:
        >>> import sparity
        >>> model = sparity.load("zoo:llama", dtype="bfloat16")
        >>> with sparity.attached(model, form="bitmask"):
        ...     print(type(model.model.layers[0].mlp.up_proj).__name__)
        PackedLinear
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'Linear'
    """
    _check(model)
    encoding = build_encoding(values)
    before, swaps = has_fast_path(model), list[Swap]()
    try:
        for swap in _vocabulary_swaps(model, build_encoding(embeddings)):
            swaps.append(swap)
            swap.put()
        for swap in _swaps(model, form, encoding):
            swaps.append(swap)
            swap.put()
            if encoding.exact:
                swap.let_go()
        save_packed(model)
        yield enable_fast_path(model)
    finally:
        if not before:
            disable_fast_path(model)
            save_plain(model)
        for swap in swaps:
            swap.undo()
        if any(isinstance(swap.packed, PackedEmbedding) for swap in swaps):
            recall_ties(model)
        if before:
            enable_fast_path(model)


def declines(model: Any) -> str | None:
    """Why the engine does not run a causal language model as it is held, or None when it does."""
    found = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    if found == {("cpu", torch.bfloat16)}:
        return None
    shown = ", ".join(sorted(f"{str(dtype).removeprefix('torch.')} on {device}" for device, dtype in found))
    return f"the engine runs models in bfloat16 on the CPU, not {shown}"


def _check(model: Any) -> None:
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise InvalidInput(
            f"attach takes a causal language model of transformers, not {type(model).__name__}: where one is wrapped, "
            "attach the model inside"
        )
    if reason := declines(model):
        raise InvalidInput(f"{reason}: model.to('cpu', torch.bfloat16)")


def _swaps(model: Any, form: Form, encoding: Encoding) -> Iterator[Swap]:
    """What is to be put where, one after another; a layer that several places share gives a swap for each."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())

    def swap(name: str, original: Any, packed: HoldsPacked) -> Swap:
        own = tuple(name for name in packed.weights if uses[id(original.get_parameter(name))] == 1)
        return _swap(model, name, original, packed, own)

    for layer, places in _linear(model):
        linear = _packed_linear(places[0], layer, form, encoding, skip_before(model, places[0], layer))
        if linear is not None:
            if isinstance(layer, DenseLinear):
                layer.release()  # what it holds ready would keep its weight in memory
            yield swap(places[0], layer, linear)
            yield from (swap(name, layer, linear.named(name)) for name in places[1:])
    for name, layer in list(model.named_modules()):
        if type(layer) is PackedLinear and form in ("smallest", "fastest"):
            again = laid_out(model, name, layer, layer.packed)
            if again is not layer.packed:
                linear = layer.named(layer.matrix)
                linear.give(again)
                yield _swap(model, name, layer, linear, ())
    for name, stored in experts_of(model).items():
        experts = model.get_submodule(name)
        packed = None if _replaced(experts) else _packed_experts(experts, stored, form, encoding)
        if packed is not None:
            yield swap(name, experts, packed)


def _vocabulary_swaps(model: Any, encoding: Encoding) -> Iterator[Swap]:
    """What is to be put in the places of the embedding and of the head; nothing where they stay, or are packed."""
    if encoding.exact or isinstance(model.get_input_embeddings(), PackedEmbedding):
        return
    places = vocabulary_of(model)
    found = {name: _vocabulary_matrix(model, name, encoding) for name in places.matrices}
    forget_ties(model)
    layer: Any = model.get_submodule(places.embedding)
    embedding = PackedEmbedding.like(layer, places.embedding)
    embedding.give(found[places.embedding])
    yield _swap(model, places.embedding, layer, embedding, embedding.weights)
    if places.head is not None:
        layer = model.get_submodule(places.head)
        if isinstance(layer, DenseLinear):
            layer.release()
        head = PackedHead.like(layer, places.embedding if places.tied else places.head)
        if places.tied:
            head.share(embedding)
        else:
            head.give(found[places.head])
        yield _swap(model, places.head, layer, head, () if places.tied else head.weights)


def _vocabulary_matrix(model: Any, name: str, encoding: Encoding) -> Packed:
    return _packed(name, model.get_submodule(name).weight.detach(), build_format(FORMAT), encoding)


def _swap(model: Any, name: str, original: Any, packed: HoldsPacked, own: tuple[str, ...]) -> Swap:
    owner, _, leaf = name.rpartition(".")
    return Swap(model.get_submodule(owner), leaf, original, packed, own)


def _linear(model: Any) -> list[tuple[Any, list[str]]]:
    """The linear layers of the blocks, which transformers' routers are not, and all names that each has."""
    found: dict[Any, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        packable = type(layer) in (nn.Linear, DenseLinear, Conv1D) and not _replaced(layer)
        if packable and name.startswith(f"{model.base_model_prefix}."):
            found.setdefault(layer, []).append(name)
    return list(found.items())


def _replaced(module: Any) -> bool:
    """Whether another function stands in the place of a module's `forward`: what it does with the weight is unknown."""
    return "forward" in vars(module)


def _packed_linear(
    name: str, layer: Any, form: Form, encoding: Encoding, skip: InputSkip | None
) -> PackedLinear | None:
    """A packed layer for the place of `layer`; None where it stays, because dense is what it will be."""
    transposed = isinstance(layer, Conv1D)
    weight = layer.weight.detach()
    weight = weight.T if transposed else weight
    chosen = _chosen(weight, form, encoding)
    if chosen.name == "dense" and form in ("smallest", "fastest") and pays(encoding, skip):
        chosen = build_format("columns")  # the weights of a channel that is skipped are not read
    if chosen.name == "dense" and encoding.exact and not transposed:
        return None
    replacement = PackedLinear(name, weight.shape[1], weight.shape[0], layer.bias, transposed)
    replacement.give(_packed(name, weight, chosen, encoding))
    return replacement.stand_for(layer)


def _packed_experts(experts: Any, stored: ExpertNames, form: Form, encoding: Encoding) -> PackedExperts | None:
    """Packed experts for the place of a module with fused ones; None where it stays, because all would be dense."""
    every = [[matrix.detach() for matrix in expert_matrices(experts, expert)] for expert in range(len(stored))]
    chosen = [[_chosen(matrix, form, encoding) for matrix in expert] for expert in every]
    if encoding.exact and {found.name for expert in chosen for found in expert} == {"dense"}:
        return None
    replacement = PackedExperts.like(experts, stored)
    replacement.give(
        (
            _packed(names[0], gate, forms[0], encoding),
            _packed(names[1], up, forms[1], encoding),
            _packed(names[2], down, forms[2], encoding),
        )
        for names, (gate, up, down), forms in zip(stored, every, chosen, strict=True)
    )
    return replacement


def _chosen(weight: Tensor, form: Form, encoding: Encoding) -> Format:
    if form == "fastest":
        return fastest_format(weight, encoding).format
    return smallest_format(weight, encoding) if form == "smallest" else build_format(form)


def _packed(name: str, weight: Tensor, form: Format, encoding: Encoding) -> Packed:
    try:
        return form.pack(weight, encoding)
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from error
