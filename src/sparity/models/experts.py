"""Mixture-of-experts layers: one parameter for all experts in memory, a matrix per expert on disk."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparity.models.block import InputSite, Projection
from sparity.models.families.base import Fused, family_of

GATE_UP, DOWN = "gate_up_proj", "down_proj"  # the parameters [experts, 2 * inner, hidden] and [experts, hidden, inner]
ExpertNames = tuple[tuple[str, str, str], ...]  # the gate, up and down of each expert


def expert_sites(experts: nn.Module, name: str, roles: dict[str, str]) -> tuple[InputSite, ...]:
    """Two input sites per expert: its routed tokens, and what they become before `down`.

    `roles` names the stored matrices of gate, up and down. The router is never pruned and has no site.
    """
    (count, rows, _), (_, hidden, _) = (_shape(experts, parameter) for parameter in (GATE_UP, DOWN))
    half, sites = rows // 2, []
    for expert in range(count):
        place = f"{name}.{expert}"
        first = tuple(
            Projection(f"{place}.{roles[role]}", role, experts, rows=part, parameter=GATE_UP, expert=expert)
            for role, part in (("gate", (0, half)), ("up", (half, 2 * half)))
        )
        second = Projection(
            f"{place}.{roles['down']}", "down", experts, rows=(0, hidden), parameter=DOWN, expert=expert
        )
        sites.append(InputSite(f"{place}.gate_up", first, partial(_routed_tokens, expert)))
        sites.append(InputSite(f"{place}.down", (second,), partial(_intermediate, expert)))
    return tuple(sites)


def stored_experts(name: str, memory: str, disk: str, roles: dict[str, str], count: int) -> str | Fused:
    """The stored matrices of an expert parameter, any other name with `memory` replaced by `disk`."""
    match = re.fullmatch(rf"(.*\.){re.escape(memory)}\.experts\.({GATE_UP}|{DOWN})", name)
    if not match:
        return re.sub(rf"(^|\.){re.escape(memory)}\.", rf"\g<1>{disk}.", name)
    kinds = ("gate", "up") if match[2] == GATE_UP else ("down",)
    return Fused(
        tuple(
            tuple(f"{match[1]}{disk}.experts.{expert}.{roles[kind]}.weight" for kind in kinds)
            for expert in range(count)
        )
    )


def experts_of(model: Any) -> dict[str, ExpertNames]:
    """Path of each module of a model that holds experts as fused parameters -> where checkpoints keep each matrix.

    A tensor is called as its matrix, with `.weight` behind.
    """
    family, found = family_of(model.config), {}
    for path, module in model.named_modules():
        if not {GATE_UP, DOWN} <= module._parameters.keys():
            continue
        gate_up, down = (family.stored_as(f"{path}.{name}", model.config) for name in (GATE_UP, DOWN))
        if isinstance(gate_up, Fused) and isinstance(down, Fused):
            found[path] = tuple(
                (gate.removesuffix(".weight"), up.removesuffix(".weight"), last.removesuffix(".weight"))
                for (gate, up), (last,) in zip(gate_up.names, down.names, strict=True)
            )
    return found


def expert_matrices(experts: nn.Module, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up `[inner, hidden]` and down `[hidden, inner]` of one expert, as views."""
    gate, up = experts.get_parameter(GATE_UP)[expert].chunk(2)
    return gate, up, experts.get_parameter(DOWN)[expert]


def _shape(experts: Any, name: str) -> torch.Size:
    """Of a parameter, also where a module stands for the one that had it."""
    found: torch.Size = experts.get_parameter(name).shape if name in experts._parameters else experts.shapes[name]
    return found


def _routed_tokens(expert: int, experts: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    hidden: Tensor
    hidden, chosen = arguments[0], arguments[1]  # [tokens, hidden], [tokens, k]
    return hidden[(chosen == expert).any(-1)]


def _intermediate(expert: int, experts: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    tokens = _routed_tokens(expert, experts, arguments)
    weight = experts.get_parameter(GATE_UP)[expert]
    gate, up = (tokens @ weight.T).chunk(2, dim=-1)
    activate: Callable[[Tensor], Tensor] = experts.act_fn  # type: ignore[assignment]
    return activate(gate) * up
