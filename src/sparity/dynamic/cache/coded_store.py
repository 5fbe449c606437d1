"""A store whose keys also have short codes, by which a query finds those that it reads (PQCache; arXiv:2407.12820)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparity.dynamic.cache.codebooks import nearest
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.policies.base import highest, ranked
from sparity.dynamic.cache.policies.pqcache import PQCache
from sparity.dynamic.cache.store import Store


class CodedStore(PagedStore):
    """A store whose pages are single slots; beside its key each has a code, uint8 `[parts]`.

    Centroids are found when a query first chooses, of the keys before it; later keys get the code of what lies nearest.

    Args:
        keys: see `Store`, as are all others but `reader`.
        values: see there.
        first: see there.
        mass: see there.
        reader: whose codes they are.
    """

    def __init__(self, keys: Tensor, values: Tensor, first: int, mass: bool, reader: PQCache) -> None:
        reader.check_width(keys.shape[-1])
        self.reader = reader
        self.books: list[Tensor] = []  # of each head, row by row; empty until they are found
        self.found_at = 0  # how long the text was then
        super().__init__(keys, values, first, mass, page=1)
        self.buffers["codes"] = torch.zeros(len(self.keys), reader.parts, dtype=torch.uint8, device=keys.device)

    @property
    def nbytes(self) -> int:
        """See `Slots.nbytes`, with the centroids."""
        return super().nbytes + sum(books.nbytes for books in {id(each): each for each in self.books}.values())

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """See `Holding`."""
        Store.append(self, keys, values, first)
        if self.books:
            self._encode(keys.shape[2])

    def moved(self) -> None:
        """See `Slots.moved`: codes move with their slots."""

    def select_rows(self, rows: Tensor) -> None:
        """See `Holding`."""
        if self.books:
            self.books = [self.books[row * self.heads + head] for row in rows.tolist() for head in range(self.heads)]
        super().select_rows(rows)

    def crop(self, length: int) -> None:
        """See `Holding`; centroids of tokens that are gone go with them."""
        super().crop(length)
        if length < self.found_at:
            self.books, self.found_at = [], 0

    def chosen(
        self,
        query: Tensor,
        budgets: Sequence[int],
        protected: tuple[int, int],
        length: int,
        scaling: float,
        softcap: float | None,
    ) -> list[Tensor]:
        """The slots of each head that a query reads, rising.

        Args:
            query: `[rows, heads, 1, width]`.
            budgets: of each row, how many tokens are read.
            protected: how many of the first and of the last tokens are read in any case.
            length: of the text before the query.
            scaling: of logits.
            softcap: of logits.
        """
        if not self.books:
            self._find(length)
        grouped = query.detach().reshape(self.rows, self.heads, -1, query.shape[-1])
        found = []
        for number, books in enumerate(self.books):
            row, head = divmod(number, self.heads)
            codes = self.buffers["codes"][self.cut(row, head)]
            weights = self.reader.weights(grouped[row, head], codes, books, scaling, softcap)
            slots = torch.arange(len(codes), device=weights.device)
            shielded = (slots < protected[0]) | (slots >= len(codes) - protected[1])
            found.append(highest(ranked(weights, shielded, None), budgets[row]).nonzero().flatten())
        return found

    def _find(self, length: int) -> None:
        """Find the centroids of all keys before `length`."""
        for number in range(len(self.lengths)):
            keys, _, places = self.segment(*divmod(number, self.heads))
            before = keys[places < length]
            self.books.append(self.reader.books(before if len(before) else keys))
        self.found_at = length
        self._encode(int(self.lengths.max()))

    def _encode(self, new: int) -> None:
        """Give the last `new` slots of every head their codes."""
        buffer = self.writable("codes")
        for number, books in enumerate(self.books):
            cut = self.cut(*divmod(number, self.heads))
            last = slice(max(cut.start, cut.stop - new), cut.stop)
            buffer[last] = nearest(self.keys[last], books)
