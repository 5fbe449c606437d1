"""Keys and values in a few bits: minimum and step of each group (KIVI; Liu et al. 2024, arXiv:2402.02750)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparity.dynamic.cache.checks import check_states
from sparity.dynamic.cache.seen import cut
from sparity.errors import InvalidInput, wrong_input

Per = Literal["channel", "token"]


@dataclass(frozen=True)
class QuantizedStates:
    """Keys or values of some tokens in 2, 4 or 8 bits each.

    Attributes:
        packed: uint8 `[batch, kv_heads, tokens, width * bits / 8]`, the lowest bits first.
        scale: the step of each group, `[batch, kv_heads, tokens / group, width]` per channel,
            `[batch, kv_heads, tokens, width / group]` per token, in the states' type; 0 where all numbers are equal.
        zero: the minimum of each group, like `scale`.
        bits: of a code.
        per: whether a group is neighbouring tokens of one channel, or neighbouring channels of one token.
        group: numbers in a group.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    per: Per
    group: int

    @property
    def codes(self) -> Tensor:
        """uint8 `[batch, kv_heads, tokens, width]`, from 0 to `2 ** bits - 1`."""
        return unpacked(self.packed, self.bits)

    @property
    def nbytes(self) -> int:
        """Of codes, scales and minima."""
        return self.packed.nbytes + self.scale.nbytes + self.zero.nbytes

    def dequantize(self) -> Tensor:
        """The states again, `code * scale + zero`, in their type."""
        grouped = _grouped(self.codes.to(self.scale.dtype), self.per, self.group)
        dim = 3 if self.per == "channel" else 4
        return _flat(grouped * self.scale.unsqueeze(dim) + self.zero.unsqueeze(dim), self.per)


@wrong_input()
def quantize_cache(states: Tensor, *, bits: int, per: Per, group: int = 32) -> QuantizedStates:
    """Quantise keys or values, asymmetrically: `code = round((x - min) / scale)`, `scale = (max - min) / (2^bits - 1)`.

    KIVI keeps keys per channel, in groups of 32 tokens, values per token, in groups of 32 channels, and the last 128
    tokens as they are; which tokens those are is for the caller to say.

    Args:
        states: `[batch, kv_heads, tokens, width]`.
        bits: 2, 4 or 8.
        per: `channel` (for keys) or `token` (for values).
        group: numbers that share a step: tokens per channel, channels per token.

    Raises:
        InvalidInput: another number of bits; tokens or channels that do not fill whole groups.
        NumericalError: NaN or infinite numbers.

    Example:
        >>> import sparity, torch
        >>> states = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).view(1, 1, 1, 4)
        >>> found = sparity.quantize_cache(states, bits=2, per="token", group=4)
        >>> found.codes.flatten().tolist(), found.scale.item(), found.zero.item()
        ([0, 1, 2, 3], 1.0, 0.0)
        >>> torch.equal(found.dequantize(), states)
        True
    """
    _check(states, bits, per, group)
    grouped, dim = _grouped(states.detach(), per, group), 3 if per == "channel" else 4
    low, high = grouped.amin(dim).float(), grouped.amax(dim).float()
    zero, scale = low.to(states.dtype), ((high - low) / (2**bits - 1)).to(states.dtype)
    step = scale.float().unsqueeze(dim)
    codes = ((grouped.float() - zero.float().unsqueeze(dim)) / step.where(step > 0, 1)).round()
    codes = _flat(codes.clamp(0, 2**bits - 1), per).to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=states.device)
    packed = (cut(codes, -1, 8 // bits) << shifts).sum(-1, dtype=torch.uint8)
    return QuantizedStates(packed, scale, zero, bits, per, group)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., n * 8 / bits]` from bytes `[..., n]`, the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    found: Tensor = (packed[..., None] >> shifts & (2**bits - 1)).flatten(-2)
    return found


def _grouped(x: Tensor, per: Per, group: int) -> Tensor:
    """`[batch, kv_heads, groups, group, width]` per channel, `[batch, kv_heads, tokens, groups, group]` per token."""
    return cut(x, 2 if per == "channel" else 3, group)


def _flat(x: Tensor, per: Per) -> Tensor:
    return x.flatten(2, 3) if per == "channel" else x.flatten(3, 4)


def _check(states: Any, bits: Any, per: Any, group: Any) -> None:
    check_states(states=states)
    if isinstance(bits, bool) or bits not in (2, 4, 8):
        raise InvalidInput(f"bits {bits!r} must be 2, 4 or 8")
    if per not in ("channel", "token"):
        raise InvalidInput(f"per {per!r} must be channel (for keys) or token (for values)")
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise InvalidInput(f"group {group!r} must be a whole number from 1 on")
    filled, what = (states.shape[2], "tokens") if per == "channel" else (states.shape[3], "channels")
    if filled % group:
        raise InvalidInput(
            f"{filled} {what} do not fill groups of {group}: keep the last {filled % group} as they are, or change "
            "`group`"
        )
    if states.shape[3] * bits % 8:
        raise InvalidInput(f"{states.shape[3]} channels of {bits} bits do not fill whole bytes")
