"""What a method is told about a place: its activations, from the statistics of the projections' inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparity.calibration import Statistics
from sparity.dynamic.activations.methods.base import Method, Seen, nothing_skipped
from sparity.dynamic.activations.places import Place
from sparity.errors import InvalidInput
from sparity.models import Projection
from sparity.stages.kernel_time import milliseconds


@dataclass(frozen=True)
class Together:
    """The same tokens at several sites of a block, and at one of the block before.

    Attributes:
        inputs: site -> `[tokens, in]`, float32.
        before: what the place like this one reads in the block before, `[tokens, in]`; None = not asked for, or there
            is no such block.
    """

    inputs: Mapping[str, Tensor]
    before: Tensor | None = None


def fit_place(
    method: Method, place: Place, inputs: Statistics, sparsity: float, together: Together | None = None
) -> tuple[dict[str, Tensor], float]:
    """The method's data for a place, and the share of a sample's channels that it skips.

    Args:
        method: fitted to the place.
        place: where.
        inputs: the statistics of `place.site`, those that the stage needs.
        sparsity: the share to skip, in [0, 1).
        together: the same tokens at several sites, where the method needs them.
    """
    if sparsity == 0:
        return nothing_skipped(), 0.0
    seen = seen_at(method, place, inputs) if together is None else seen_together(place, together)
    tensors = method.fit(seen, sparsity)
    return tensors, skipped_share(method, tensors, seen)


def data_bytes(method: Method, place: Place, sparsity: float) -> int:
    """The bytes of the data that `fit_place` will give; no weight is read."""
    if sparsity == 0:
        return sum(tensor.nbytes for tensor in nothing_skipped().values())
    return method.nbytes(place, sparsity)


def skipped_share(method: Method, tensors: Mapping[str, Tensor], seen: Seen) -> float:
    """The share of the channels of all tokens seen that the data skips; of all calibration tokens where counted."""
    if "histogram" in seen.statistics.needs and seen.sample is None:
        counts = seen.statistics.histogram  # of all tokens
        last = int(tensors["threshold"].view(torch.int32)) >> 16  # the bin that the threshold is the upper end of
        return int(counts[: last + 1].sum()) / int(counts.sum())
    return 1 - float(method.mask(tensors, seen.read[None]).double().mean())


def seen_together(place: Place, together: Together) -> Seen:
    """What a method needs to know of neurons or heads that it sees together with what is read before them."""
    x = together.inputs[place.site.name]
    statistics = Statistics.gather(place.name, ())
    roles = tuple(projection.role for projection in place.reads)
    if place.gives is None:
        return Seen(statistics, place.weight, None, x, roles, _neurons(place, x), before=together.before)
    outputs = together.inputs[place.gives.name]
    norms = outputs.view(len(outputs), place.heads, -1).norm(dim=-1)
    return Seen(statistics, place.weight, None, x, roles, head_norms=norms, before=together.before)


def seen_at(method: Method, place: Place, inputs: Statistics) -> Seen:
    """What a method needs to know of a place."""
    roles = tuple(projection.role for projection in place.reads)
    if place.kind == "neurons":
        return Seen(
            inputs.only(method.statistics), place.weight, roles=roles, neurons=_neurons(place, inputs["inputs"])
        )
    if place.kind != "gate_output":
        return Seen(inputs.only(method.statistics), place.weight, roles=roles)
    x, gate, up = inputs["inputs"], place.reads[0], place.saves[0]
    values = place.module(_product(gate, x))
    statistics = Statistics.gather(f"{place.name}.output", method.statistics)
    statistics.add(values)
    return Seen(statistics, place.weight, _product(up, x), values, roles)


def _neurons(place: Place, x: Tensor) -> Tensor:
    """What the last projection of an MLP reads when the MLP reads `x` [tokens, hidden].

    Raises:
        InvalidInput: a neuron that is not computed would not be 0.
    """
    first, *others = (_product(projection, x) for projection in place.reads)
    neurons: Tensor = place.module(first)
    if bool(place.module(torch.zeros_like(first[:1])).any()):
        raise InvalidInput(f"activations: {place.name}: a neuron is 0 only where its function of 0 is, which it is not")
    return neurons * others[0] if others else neurons


def _product(projection: Projection, x: Tensor) -> Tensor:
    bias = getattr(projection.module, "bias", None)
    if bias is not None and projection.rows is not None:
        bias = bias[slice(*projection.rows)]
    return linear(x, projection.weight.float().to(x.device), None if bias is None else bias.float())


def clock(place: Place) -> Callable[[float], float] | None:
    """How long a token's product with what reads a place takes at a share; None where rows are skipped too."""
    if place.kind not in ("input", "hidden"):
        return None
    rows, dtype = sum(projection.weight.shape[0] for projection in place.reads), place.reads[0].weight.dtype
    return lambda share: milliseconds(rows, place.columns, dtype, share, "inputs")
