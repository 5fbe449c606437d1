"""SliceGPT: the stream turned to principal directions, the last cut off (Ashkboos et al. 2024, arXiv:2401.15024)."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.block import Block, set_features
from sparity.models.cuts.hidden import block_norms, set_norm
from sparity.models.cuts.rotation import fold_norms, rotate, turned, turned_bias
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import HIDDEN
from sparity.registry import register
from sparity.static.structure.methods.base import Choice, Method, Restructured
from sparity.static.structure.subject import Subject
from sparity.static.structure.wrapped import Sliced, attention_output, mlp_output, principal

LIKE_LLAMA = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@register("structure.method", "slicegpt")
@dataclass(frozen=True)
class SliceGPT(Method):
    """Turn the hidden states to principal components of the text's, and keep the first of them.

    `rotation: block` is the published method: a basis for each place between parts, matrices on shortcuts.
    `rotation: global` takes one basis for all places, of the normalised states: a stock model of a smaller hidden size.
    The number that stays is rounded down to a multiple of `round_to`.
    """

    rotation: Literal["block", "global"] = "block"
    damping: float = 0.01
    round_to: int = 8

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """The eigenvalues, descending: of the states before each block, or with one basis of all of them."""
        if self.rotation == "global":
            values, _ = principal(_shared_gram(subject), self.damping)
            return {HIDDEN: values.float().expand(subject.depth, -1).clone()}
        grams = [_gram(visit.hidden) for visit in subject.visits()]
        return {HIDDEN: torch.stack([principal(gram, self.damping)[0].float() for gram in grams])}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """The first principal components."""
        return {HIDDEN: list(range(self._left(int(subject.config.hidden_size), sparsity)))}

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`."""
        kept = self.choose(subject, sparsity)
        model = copy.deepcopy(subject.model)
        if not sparsity:
            return Restructured(model, kept)
        blocks = blocks_of(model, subject.family)
        fold_norms(model, subject.family, blocks)
        if self.rotation == "global":
            _, basis = principal(_shared_gram(subject), self.damping)
            rotate(model, subject.family, blocks, basis)
            return Restructured(cut_model(model, kept), kept)
        _Slicing(model, subject, blocks, self.damping).slice(len(kept[HIDDEN]))
        return Restructured(model, kept)

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        if self.rotation != "global":
            raise InvalidInput(
                "slicegpt puts matrices on the shortcuts, which no stock configuration can say: set `rotation: global` "
                "(sparity.restructure gives the published model in memory)"
            )
        return {HIDDEN: self._left(int(decoder.config.hidden_size), sparsity)}

    def config_changes(self, decoder: Decoder) -> dict[str, Any]:
        """The head gets a matrix of its own, since the norm before it is folded in."""
        return {"tie_word_embeddings": False}

    def _left(self, size: int, sparsity: float) -> int:
        if not sparsity:
            return size
        left = int((1 - sparsity) * size)
        left -= left % self.round_to
        if left < 1:
            raise InvalidInput(f"slicegpt: a sparsity of {sparsity:g} leaves none of {size}: lower it, or `round_to`")
        return left


class _Slicing:
    """The published method: every basis is that of states which the parts before, already sliced, give."""

    def __init__(self, model: nn.Module, subject: Subject, blocks: list[Block], damping: float) -> None:
        for block in blocks:
            llama = all(hasattr(block.module, name) for name in LIKE_LLAMA)
            if not llama or any(projection.expert is not None for projection in block.projections):
                raise InvalidInput(f"{block.name} is not shaped like Llama's: set `rotation: global`")
        self._model, self._blocks, self._damping = model, blocks, damping
        self._inputs = subject.decoder.inputs(subject.tokens, 1)
        self._path = subject.family.blocks

    @torch.no_grad()
    def slice(self, left: int) -> None:
        """Slice everything but the input of the head, in place."""
        model: Any = self._model
        size = int(model.config.hidden_size)
        _, basis = principal(_gram(self._inputs.hidden), self._damping)
        basis = basis[:, :left]
        embedding = model.get_input_embeddings()
        _put(embedding, embedding.weight.double() @ basis)
        embedding.embedding_dim = left
        states = self._inputs.hidden.double() @ basis  # [samples, tokens, left]
        modules = []
        for block in self._blocks:
            norms = block_norms(block, size)
            basis, between, shortcut = self._half(block, norms[0], basis, states, left, ("q", "k", "v", "qkv"), "o")
            last = size if block is self._blocks[-1] else left
            first = shortcut
            basis, states, shortcut = self._half(block, norms[1], basis, between, last, ("gate", "up"), "down")
            modules.append(Sliced(block.module, first, shortcut))
        head = model.get_output_embeddings()
        _put(head, head.weight.double() @ basis)
        owner, _, name = self._path.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.ModuleList(modules))

    def _half(
        self,
        block: Block,
        norm: nn.Module,
        basis: Tensor,
        states: Tensor,
        left: int,
        reads: tuple[str, ...],
        writes: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slice one half of a block: the basis behind it, the states there, and the matrix on its shortcut."""
        size, kept = basis.shape
        readers = [projection for projection in block.projections if projection.role in reads]
        for projection in readers:
            _put(projection.module, turned(projection, basis))
        set_norm(norm, torch.ones(kept), size)
        dtype = next(block.module.parameters()).dtype
        added = torch.stack([self._output(block, writes, sample[None].to(dtype))[0] for sample in states]).double()
        whole = added + states @ basis.T  # in the model's own basis
        _, after = principal(_gram(whole), self._damping)
        after = after[:, :left]
        for projection in block.projections:
            if projection.role == writes:
                bias = turned_bias(projection, after)
                _put(projection.module, turned(projection, after), bias)
        return after, whole @ after, (basis.T @ after).to(dtype)

    def _output(self, block: Block, writes: str, hidden: Tensor) -> Tensor:
        if writes == "down":
            return mlp_output(block.module, hidden)
        return attention_output(block.module, hidden, **self._inputs.arguments[1][block.index])


def _put(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    old = module.get_parameter("weight")
    module.weight = nn.Parameter(weight.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)
    if not isinstance(module, nn.Embedding):
        set_features(module, *weight.shape)


def _gram(hidden: Tensor) -> Tensor:
    """The sum of x xT over all tokens of `[samples, tokens, hidden]`, in float64."""
    size = hidden.shape[-1]
    total = torch.zeros(size, size, dtype=torch.float64)
    for sample in hidden:
        x = sample.double()
        total += x.T @ x
    return total


def _shared_gram(subject: Subject) -> Tensor:
    """That of the states before and behind every block, each token's divided by its root mean square."""
    total: Tensor | None = None
    for visit in subject.visits():
        total = _normalised(visit.hidden) if total is None else total + _normalised(visit.hidden)
        visit.finish()
    assert total is not None
    return total + _normalised(visit.hidden)


def _normalised(hidden: Tensor) -> Tensor:
    x = hidden.double()
    return _gram(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12))
