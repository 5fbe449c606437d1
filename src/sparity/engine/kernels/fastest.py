"""Which format multiplies a weight by one input fastest on this machine; dense unless another wins clearly."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparity.engine.kernels import native, native_weight
from sparity.engine.kernels.choice import Case, Choice, choose, default_timer, density_step
from sparity.engine.kernels.prepared import prepare
from sparity.engine.kernels.smallest import smallest_format
from sparity.engine.kernels.timing import Call, Timer
from sparity.formats import Encoding, EncodingSpec, Format, Packed, build_encoding, build_format
from sparity.formats.storage.values import nonzero

WORTHWHILE = 0.75


@dataclass(frozen=True)
class Fastest:
    """The format, what the timing holds for, and why the other formats lost."""

    format: Format
    case: Case
    choice: Choice


def fastest_format(weight: Tensor, values: EncodingSpec = "same", timer: Timer | None = None) -> Fastest:
    """Of the formats that can hold `weight` [rows, columns], the one that is multiplied fastest by one input.

    Timed once per shape, step of density, type of values and competing formats; `timer` takes the clock's place. Where
    nothing is timed, the smallest format when it takes at most `WORTHWHILE` of dense's bytes, else dense.

    Raises:
        InvalidInput: no such encoding, or numbers that it cannot express.
    """
    rows, columns = weight.shape[0], weight.shape[1]
    encoding = build_encoding(values)
    with_kernels = sorted({form for form, _ in native_weight.TAKES} - {"dense"})
    every = {name: build_format(name) for name in ("dense", *with_kernels)}
    forms = {name: form for name, form in every.items() if not form.by_channel}
    kept = int(torch.count_nonzero(nonzero(weight)))
    offered = {name: declines(forms, name, weight, encoding, kept) for name in forms}
    case = Case(
        rows=rows,
        columns=columns,
        format="/".join(name for name, reason in offered.items() if reason is None),
        values=encoding.words(weight.dtype),
        density=density_step(kept, rows * columns),
        batch=1,
        threads=native.threads(),
        bits=encoding.bits(weight.dtype),
    )

    def calls(names: list[str]) -> Mapping[str, Call]:
        x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        return {name: partial(prepare(forms[name].pack(weight, encoding), timer), x) for name in names}

    choice = choose(
        case,
        offered,
        calls,
        rule=_rule(forms, weight, encoding, kept),
        favourite="dense",
        timer=timer if timer else default_timer(),
    )
    return Fastest(forms[choice.winner], case, choice)


def _rule(forms: Mapping[str, Format], weight: Tensor, encoding: Encoding, kept: int) -> str:
    shape, smallest = (weight.shape[0], weight.shape[1]), smallest_format(weight, encoding)
    dense = forms["dense"].nbytes(shape, kept, weight.dtype, encoding)
    return smallest.name if smallest.nbytes(shape, kept, weight.dtype, encoding) <= WORTHWHILE * dense else "dense"


def declines(forms: Mapping[str, Format], name: str, weight: Tensor, encoding: Encoding, kept: int) -> str | None:
    """Why a format does not compete, or None when it does; dense always does."""
    shape = weight.shape[0], weight.shape[1]
    if name == "dense":
        return None
    if reason := native_weight.declines(Packed(name, shape, weight.dtype, {}, forms[name].options, encoding)):
        return reason
    if not forms[name].matches(weight):
        return "cannot hold this mask"

    def size(other: str) -> int:
        count = forms[other].count(weight) if other == "block" else kept
        return forms[other].nbytes(shape, count, weight.dtype, encoding)

    if name == "block" and size("block") > size("bitmask"):
        return "the zeros do not lie in blocks"
    return "takes no fewer bytes than dense" if size(name) >= size("dense") else None
