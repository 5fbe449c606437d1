"""SliceGPT: the stream turned to principal directions, the last cut off (Ashkboos et al. 2024, arXiv:2401.15024)."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.rotation import fold_norms, rotate
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import HIDDEN
from sparity.registry import register
from sparity.static.structure.methods.base import Choice, Method, Restructured
from sparity.static.structure.slicing import Slicing, gram_of, shared_gram
from sparity.static.structure.subject import Subject
from sparity.static.structure.wrapped import principal


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
            values, _ = principal(shared_gram(subject), self.damping)
            return {HIDDEN: values.float().expand(subject.depth, -1).clone()}
        grams = [gram_of(visit.hidden) for visit in subject.visits()]
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
            _, basis = principal(shared_gram(subject), self.damping)
            rotate(model, subject.family, blocks, basis)
            return Restructured(cut_model(model, kept), kept)
        Slicing(model, subject, blocks, self.damping).slice(len(kept[HIDDEN]))
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
