"""Mixture-of-experts layers whose experts are packed, each matrix by itself."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparity.engine.kernels.gemv.cpu import gemv_many
from sparity.engine.kernels.prepared import GEMV, Prepared, prepare
from sparity.engine.modules.linear import multiply
from sparity.engine.modules.packed_module import HoldsPacked
from sparity.formats import Packed, unpack
from sparity.models.experts import DOWN, GATE_UP, ExpertNames

PackedExpert = tuple[Packed, Packed, Packed]  # gate and up [inner, hidden], down [hidden, inner]


class PackedExperts(HoldsPacked):
    """In place of a module that holds all experts in the parameters `gate_up_proj` and `down_proj`.

    The weights are no parameters: they cannot be trained, moved to another device or cast. Inputs are cast to their
    type. Results are rounded where transformers' own loop over experts rounds.

    Attributes:
        names: the names under which the checkpoint keeps the matrices.
        kind: the class of the module that it stands for, which is built from `config`.
        shapes: of the parameters that it stands for.
    """

    weights = (GATE_UP, DOWN)

    def __init__(self, names: ExpertNames, like: Any) -> None:
        super().__init__()
        self.names, self.kind, self.config, self.act_fn = names, type(like), like.config, like.act_fn
        self.shapes = {name: like.get_parameter(name).shape for name in self.weights}
        self._prepared: list[tuple[Prepared, Prepared, Prepared]] = []

    @classmethod
    def like(cls, experts: Any, names: ExpertNames) -> "PackedExperts":
        """One to stand for `experts`, without weights yet."""
        return cls(names, experts).stand_for(experts)

    def give(self, experts: Iterable[PackedExpert]) -> None:
        """Set the weights of all experts, in order.

        Raises:
            CorruptFile: one contradicts itself.
        """
        self._prepared = [(prepare(gate), prepare(up), prepare(down)) for gate, up, down in experts]
        assert len(self._prepared) == len(self.names), "a packed checkpoint is loaded as a whole"

    def matrices(self) -> Iterator[tuple[str, Packed]]:
        """Name and weight of every matrix, expert by expert, as they lie in memory."""
        for names, expert in zip(self.names, self._prepared, strict=True):
            for name, prepared in zip(names, expert, strict=True):
                yield name, prepared.packed

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(packed.nbytes for _, packed in self.matrices())

    def dense(self) -> dict[str, Tensor]:
        """The dense parameters by name, unpacked anew each time; none while a model is loaded."""
        if not self._prepared:
            return {}
        gate, _, down = (prepared.packed for prepared in self._prepared[0])
        count, (inner, hidden) = len(self.names), gate.shape
        gate_up = torch.empty(count, 2 * inner, hidden, dtype=gate.dtype)
        out = torch.empty(count, hidden, inner, dtype=down.dtype)
        for expert, (gate, up, down) in enumerate(tuple(p.packed for p in found) for found in self._prepared):
            gate_up[expert, :inner], gate_up[expert, inner:], out[expert] = unpack(gate), unpack(up), unpack(down)
        return {GATE_UP: gate_up, DOWN: out}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernels are no graph
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` [tokens, hidden] -> the same shape, each token through its own experts.

        Args:
            hidden_states: the tokens.
            top_k_index: the experts that each goes to `[tokens, k]`.
            top_k_weights: how much each of these counts `[tokens, k]`.
        """
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            tokens, places = torch.where(top_k_index == expert)  # [routed], [routed]
            made = self._expert(expert, hidden_states[tokens]) * top_k_weights[tokens, places, None]
            out.index_add_(0, tokens, made.to(out.dtype))
        return out

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        """One expert's outputs `[routed, hidden]` for its tokens `x` [routed, hidden]."""
        gate, up, down = self._prepared[expert]
        first, second = _both(x, gate, up)
        inner: Tensor = self.act_fn(first) * second  # [routed, inner]
        return multiply(inner, down)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        formats = sorted({packed.format for _, packed in self.matrices()}) if self._prepared else []
        held = f"{', '.join(formats)}, {self.nbytes:,} bytes" if formats else "no weights yet"
        return f"experts={len(self.names)}, {held}"


def _both(x: Tensor, gate: Prepared, up: Prepared) -> tuple[Tensor, Tensor]:
    """What two weights give for one input `x` [routed, hidden]; in a single call where both take it as it is."""
    plain = x.dtype == torch.bfloat16 and not (torch.is_grad_enabled() and x.requires_grad)
    kernels = [weight.native for weight in (gate, up) if weight.native and weight.choice(len(x)).winner == GEMV]
    if plain and len(kernels) == 2:
        first, second = gemv_many(kernels, x)
        return first, second
    return multiply(x, gate), multiply(x, up)
