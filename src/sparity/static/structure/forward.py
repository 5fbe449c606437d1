"""Forward passes through a model some of whose blocks are left out or changed, all blocks in memory."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparity.models import Block, BlockInputs
from sparity.products.float32 import float32_products
from sparity.static.structure.subject import Subject


class Forward:
    """The blocks of a model, loaded, and the hidden states of its text before each: `[samples, tokens, hidden]`."""

    def __init__(self, subject: Subject, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self._tokens = subject.tokens
        self._head = subject.decoder.head()
        self._tail = subject.decoder.tail()
        inputs = subject.decoder.inputs(self._tokens, 1)
        self._inputs: BlockInputs = replace(inputs, hidden=torch.empty(0))
        self.first = inputs.hidden

    def run(self, hidden: Tensor, order: Collection[int]) -> Tensor:
        """`hidden` through these blocks one after another; it stays as it is."""
        hidden = hidden.clone()
        for index in order:
            self.blocks[index].run(self._inputs, hidden, into=hidden)
        return hidden

    def normed(self, hidden: Tensor) -> Tensor:
        """The last block's outputs as the head reads them, in float32."""
        with torch.no_grad():
            parts = [self._tail(ids[None], part[None]) for ids, part in zip(self._tokens, hidden, strict=True)]
        return torch.cat(parts).float()

    def loss(self, hidden: Tensor) -> float:
        """The mean cross-entropy of the next token, in nats, over all sequences, after the last block."""
        total = 0.0
        with torch.no_grad(), float32_products():
            for sample, ids in enumerate(self._tokens):
                logits = self._head(ids[None], hidden[sample : sample + 1])[0, :-1].float()
                total += float(cross_entropy(logits, ids[1:].to(logits.device)))
        return total / len(self._tokens)

    @torch.enable_grad()
    def summed_loss(self, sample: int) -> Tensor:
        """The cross-entropy of one sequence in nats, summed over its tokens, with the graph back to every block."""
        hidden, ids = self.first[sample : sample + 1].clone().requires_grad_(), self._tokens[sample]
        with float32_products():
            for block in self.blocks:
                hidden = block.output(self._inputs, hidden)
            logits = self._head(ids[None], hidden)[0, :-1].float()
        return cross_entropy(logits, ids[1:].to(logits.device), reduction="sum")


@contextmanager
def forward(subject: Subject) -> Iterator[Forward]:
    """All blocks of a model in memory of their own, until the context closes."""
    with ExitStack() as loaded:
        blocks = [loaded.enter_context(subject.decoder.block(index)) for index in range(subject.depth)]
        yield Forward(subject, blocks)
