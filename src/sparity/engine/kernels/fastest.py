"""Which format multiplies a weight by one input fastest on this machine; dense unless another wins clearly."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparity.engine.kernels import native, native_weight
from sparity.engine.kernels.choice import Case, Choice, choose, default_timer, density_step
from sparity.engine.kernels.prepared import prepare
from sparity.engine.kernels.timing import Call, Timer
from sparity.formats import Format, Packed, build_format
from sparity.formats.conversions.smallest import smallest_format
from sparity.formats.storage.values import Values, dtype_name, nonzero

FORMATS = ("dense", "two_of_four", "bitmask", "block")
WORTHWHILE = 0.75


@dataclass(frozen=True)
class Fastest:
    """The format, what the timing holds for, and why the other formats lost."""

    format: Format
    case: Case
    choice: Choice


def fastest_format(weight: Tensor, values: Values = "same", timer: Timer | None = None) -> Fastest:
    """Of the formats that can hold `weight` [rows, columns], the one that is multiplied fastest by one input.

    Timed once per shape, step of density, type of values and competing formats; `timer` takes the clock's place. Where
    nothing is timed, the smallest format when it takes at most `WORTHWHILE` of dense's bytes, else dense.

    Raises:
        InvalidInput: NaN or infinity for int8.
    """
    rows, columns = weight.shape[0], weight.shape[1]
    forms = {name: build_format(name) for name in FORMATS}
    kept = int(torch.count_nonzero(nonzero(weight)))
    offered = {name: declines(forms, name, weight, values, kept) for name in forms}
    case = Case(
        rows=rows,
        columns=columns,
        format="/".join(name for name, reason in offered.items() if reason is None),
        values="int8" if values == "int8" else dtype_name(weight.dtype),
        density=density_step(kept, rows * columns),
        batch=1,
        threads=native.threads(),
    )

    def calls(names: list[str]) -> Mapping[str, Call]:
        x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        return {name: partial(prepare(forms[name].pack(weight, values), timer), x) for name in names}

    choice = choose(
        case,
        offered,
        calls,
        rule=_rule(forms, weight, values, kept),
        favourite="dense",
        timer=timer if timer else default_timer(),
    )
    return Fastest(forms[choice.winner], case, choice)


def _rule(forms: Mapping[str, Format], weight: Tensor, values: Values, kept: int) -> str:
    shape, smallest = (weight.shape[0], weight.shape[1]), smallest_format(weight, values)
    dense = forms["dense"].nbytes(shape, kept, weight.dtype, values)
    return smallest.name if smallest.nbytes(shape, kept, weight.dtype, values) <= WORTHWHILE * dense else "dense"


def declines(forms: Mapping[str, Format], name: str, weight: Tensor, values: Values, kept: int) -> str | None:
    """Why a format does not compete, or None when it does; dense always does."""
    shape = weight.shape[0], weight.shape[1]
    if name == "dense":
        return None
    scales = {"scales": torch.empty(0)} if values == "int8" else {}
    if reason := native_weight.declines(Packed(name, shape, weight.dtype, scales, forms[name].options)):
        return reason
    if not forms[name].matches(weight):
        return "cannot hold this mask"

    def size(other: str) -> int:
        count = forms[other].count(weight) if other == "block" else kept
        return forms[other].nbytes(shape, count, weight.dtype, values)

    if name == "block" and size("block") > size("bitmask"):
        return "the zeros do not lie in blocks"
    return "takes no fewer bytes than dense" if size(name) >= size("dense") else None
