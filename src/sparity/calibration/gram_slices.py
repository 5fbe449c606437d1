"""Gram matrices in files, summed up a few panels at a time, for a run that may not hold a block's in memory.

Every slice of the panels is a forward pass of its own, in which all others are left out. The sums of a slice are
those of `ChunkSums`: float32 within a chunk, float64 over chunks, rounded once; so the matrices are the same bits.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparity.calibration.chunks import add_wide
from sparity.calibration.input_statistics.gram import PANEL, add_panel
from sparity.calibration.mapped import release, scratch_tensor
from sparity.calibration.statistics import not_finite
from sparity.errors import NumericalError
from sparity.memory import give_back
from sparity.models import InputSite

ENTRY = 4 + 8  # bytes of an entry of a panel while it is summed: in float32 for a chunk, in float64 over chunks
Panel = tuple[int, int]  # the number of its site, its first column


@dataclass(frozen=True)
class GramFiles:
    """Where the matrices lie, and how much of their sums is in memory at once.

    Attributes:
        folder: for the files, whose disk space is free again when the matrices are.
        most: bytes of sums at once; a single panel may take more.
    """

    folder: Path
    most: int

    def matrix(self, columns: int) -> Tensor:
        """Zeros `[in, in]`, float32, in a file."""
        return scratch_tensor(self.folder, (columns, columns), torch.float32)

    def gather(
        self, sites: Sequence[InputSite], chunks: Iterable[slice], run: Callable[[slice], None]
    ) -> dict[str, tuple[Tensor, int]]:
        """By site its raw sum `[in, in]`, the upper panels only, with the number of tokens.

        Args:
            sites: of one block.
            chunks: of the calibration sequences, in order.
            run: runs the block on a chunk, with nothing but what watches the sites to show for it.

        Raises:
            NumericalError: NaN or infinite inputs.
        """
        chunks = list(chunks)
        widths = [int(site.projections[0].weight.shape[1]) for site in sites]
        found = [self.matrix(width) for width in widths]
        tokens = [0] * len(sites)
        for part in slices(widths, self.most):
            sums = dict[Panel, Tensor]()
            for chunk in chunks:
                counted = {panel: _zeros(panel, widths) for panel in part}
                seen = dict.fromkeys((number for number, _ in part), 0)
                with ExitStack() as watching:
                    for number in seen:
                        watching.enter_context(sites[number].watch(partial(_add, sites[number], number, counted, seen)))
                    run(chunk)
                for panel in part if any(seen.values()) else ():
                    if panel not in sums:
                        sums[panel] = torch.zeros_like(counted[panel], dtype=torch.float64)
                    add_wide(sums[panel], counted.pop(panel))
                for number, start in part:
                    tokens[number] += seen[number] if start == 0 else 0
            for number, start in list(sums):
                rows = slice(start, start + PANEL)
                found[number][rows, start:] = sums.pop((number, start))  # rounded once
                release(found[number][rows])
            give_back()
        return {site.name: (total, count) for site, total, count in zip(sites, found, tokens, strict=True)}


def slices(widths: Sequence[int], most: int) -> list[list[Panel]]:
    """The panels of matrices `[in, in]` of these widths, in runs whose sums take at most so many bytes, or one panel.

    Example:
        >>> slices([2048, 1024], 12 * 1024 * 2048)
        [[(0, 0)], [(0, 1024), (1, 0)]]
    """
    found, taken = list[list[Panel]](), 0
    for number, width in enumerate(widths):
        for start in range(0, width, PANEL):
            size = panel_bytes(width, start)
            if not found or taken + size > most:
                found.append([])
                taken = 0
            found[-1].append((number, start))
            taken += size
    return found


def panel_bytes(width: int, start: int = 0) -> int:
    """What the sums of a panel take while they are in memory."""
    return ENTRY * min(PANEL, width - start) * (width - start)


def _zeros(panel: Panel, widths: Sequence[int]) -> Tensor:
    number, start = panel
    return torch.zeros(min(PANEL, widths[number] - start), widths[number] - start)


def _add(site: InputSite, number: int, counted: dict[Panel, Tensor], seen: dict[int, int], inputs: Tensor) -> None:
    """Count inputs `[sequences, tokens, in]` or `[tokens, in]` of a site in its panels."""
    x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
    seen[number] += len(x)
    for (other, start), total in counted.items():
        if other == number:
            add_panel(total, x, start)
            if not bool(torch.isfinite(total.diagonal()).all()):
                raise NumericalError(not_finite(site.name))
