"""What transformers asks of a layer of its cache, whatever the layer holds of the text."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparity.dynamic.cache.auxiliary import Auxiliary
from sparity.dynamic.cache.store import Holding


class TextLayer(CacheLayerMixin):
    """A layer whose length is that of the text, and whose rows are those of its store.

    Attributes:
        store: what is held; None = nothing.
        auxiliary: tokens that go only as deep as to here, and may go on later.
        length: of the text.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    store: Holding | None
    auxiliary: Auxiliary
    length: int

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is allocated before there are tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams go on from other rows."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows go on."""
        if self.store is not None:
            self._select(torch.arange(self.store.rows)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row comes several times."""
        if self.store is not None:
            self._select(torch.arange(self.store.rows).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.store is not None:
            self.store.select_rows(rows)
        self.auxiliary.select_rows(rows)

    def get_seq_length(self) -> int:
        """Tokens of the text."""
        return self.length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Masks are made for the whole text; attention looks up the places that are held."""
        return self.length + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def get_max_length(self) -> int:
        """Texts may have any length."""
        return -1

    get_max_cache_shape = get_max_length  # its name in some releases

    @property
    def nbytes(self) -> int:
        """Of what is held."""
        return self.auxiliary.nbytes + (0 if self.store is None else self.store.nbytes)
