"""Kept values and their bits -> weights, in Triton: the part that the kernels for `bitmask` share."""

import triton
import triton.language as tl


@triton.jit
def expand(values, masks, starts):
    """The weights of some groups, 0 where none is kept: `[P, 32, 8]` in the stored type.

    `masks` uint8 [P, 32] are the groups' bytes, row after row; `starts` int32 [P] say where the groups' values begin
    behind `values`, one pointer or [P, 1, 1].

    No population count is needed: a byte's bits move to the lowest bit of eight nibbles, and one product by ones adds
    to each nibble all those below it. A nibble holds up to 8, so nothing is carried.
    """
    spread = masks.to(tl.uint32)
    spread = (spread | (spread << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    kept = ((spread * 0x11111111) >> 28).to(tl.int32)  # of each byte
    first = starts[:, None] + tl.cumsum(kept, 1) - kept
    nibble = (4 * tl.arange(0, 8)).to(tl.uint32)[None, None, :]
    below = ((spread * 0x11111110)[:, :, None] >> nibble) & 15
    is_kept = (spread[:, :, None] & (1 << nibble)) != 0
    return tl.load(values + first[:, :, None] + below, mask=is_kept, other=0)
