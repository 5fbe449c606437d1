"""SliceGPT's own way: a basis for each place of the residual stream, and a matrix on every shortcut."""

from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models.block import Block, set_features
from sparity.models.cuts.hidden import block_norms, set_norm
from sparity.models.cuts.rotation import turned, turned_bias
from sparity.static.structure.subject import Subject
from sparity.static.structure.wrapped import Sliced, attention_output, mlp_output, principal

LIKE_LLAMA = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class Slicing:
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
        _, basis = principal(gram_of(self._inputs.hidden), self._damping)
        basis = basis[:, :left]
        embedding = model.get_input_embeddings()
        _put(embedding, embedding.weight.double() @ basis)
        embedding.embedding_dim = left
        states = self._inputs.hidden.double() @ basis  # [samples, tokens, left]
        modules = []
        for block in self._blocks:
            norms = block_norms(block, size)
            basis, between, first = self._half(block, norms[0], basis, states, left, ("q", "k", "v", "qkv"), "o")
            last = size if block is self._blocks[-1] else left
            basis, states, second = self._half(block, norms[1], basis, between, last, ("gate", "up"), "down")
            modules.append(Sliced(block.module, first, second))
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
        _, after = principal(gram_of(whole), self._damping)
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


def gram_of(hidden: Tensor) -> Tensor:
    """The sum of x xT over all tokens of `[samples, tokens, hidden]`, in float64."""
    size = hidden.shape[-1]
    total = torch.zeros(size, size, dtype=torch.float64)
    for sample in hidden:
        x = sample.double()
        total += x.T @ x
    return total


def shared_gram(subject: Subject) -> Tensor:
    """That of the states before and behind every block, each token's divided by its root mean square."""
    total: Tensor | None = None
    for visit in subject.visits():
        total = _normalised(visit.hidden) if total is None else total + _normalised(visit.hidden)
        visit.finish()
    assert total is not None
    return total + _normalised(visit.hidden)


def _normalised(hidden: Tensor) -> Tensor:
    x = hidden.double()
    return gram_of(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12))
