"""CoreInfer: the neurons that are most often among the strongest of a prompt's tokens (Wang 2024, arXiv:2410.18311)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import checked, whole_number
from sparity.dynamic.activations.methods.base import Seen
from sparity.dynamic.activations.quantiles import ROUNDING
from sparity.dynamic.activations.sequence_masks import FixedNeurons, SequenceMethod
from sparity.errors import InvalidInput
from sparity.registry import register


@register("activations.method", "coreinfer")
@dataclass(frozen=True)
class CoreInfer(SequenceMethod):
    """A neuron is a token's core where it is in the top share of those above 0; those most often core count.

    Attributes:
        of_token: the share of a token's neurons above 0 that are its core.
    """

    of_token: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.of_token <= 1:
            raise InvalidInput(f"{self.name}: of_token {self.of_token} must lie in (0, 1]")

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`: `kept`, the number of neurons."""
        return {"kept": torch.tensor(max(int(seen.values.shape[-1] * (1 - sparsity) + ROUNDING), 1))}

    def rule(self, tensors: Mapping[str, Tensor], columns: int, what: str) -> "Cores":
        """See `SequenceMethod.rule`."""
        checked(tensors, {"kept": (torch.int64, ())}, what)
        return Cores(whole_number(tensors, "kept", 1, columns, what), self.of_token)


@dataclass(frozen=True)
class Cores(FixedNeurons):
    """How often each neuron is core."""

    of_token: float

    def add(self, sums: Tensor, x: Tensor, counted: Tensor) -> None:
        """See `SequenceRule.add`."""
        strength = x.float().nan_to_num(0, 0, 0)
        most = ((strength > 0).sum(-1, keepdim=True) * self.of_token + ROUNDING).long()  # [rows, tokens, 1]
        order = strength.argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(x.shape[-1], device=x.device) < most
        core = torch.zeros_like(first).scatter(-1, order, first)
        sums += (core & counted[..., None]).sum(1)
