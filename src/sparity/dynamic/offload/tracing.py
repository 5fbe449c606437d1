"""Which units count for the tokens of calibration text, seen block by block: no more than one block is in memory."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparity.dynamic.expert_skipping.skipping import skip_of
from sparity.dynamic.offload.deciding import Kind, far_experts, far_mlps
from sparity.engine.modules.skips import FIRST
from sparity.models import Block, BlockInputs
from sparity.models.experts import DOWN

Stages = Sequence[tuple[Any, Mapping[str, Tensor]]]  # run-time stages with their data


def run_traced(block: Block, inputs: BlockInputs, hidden: Tensor, stages: Stages, kind: Kind) -> list[Tensor]:
    """Send `hidden` [samples, tokens, hidden] through a block, in place, with its run-time stages.

    Returns:
        Of each MLP, or of each module of experts, bool `[samples * tokens, units]`: which unit counts for which token;
        the first few tokens of each sample, which are dense by themselves, are left out.
    """
    seen: list[list[Tensor]] = []
    with ExitStack() as open_:
        for stage, data in stages:
            open_.enter_context(stage.attach(block.module, block.sites, of_block(stage, data, block.name)))
        length = hidden.shape[1]
        for module in _watched(block, kind):
            found: list[Tensor] = []
            seen.append(found)
            if kind == "predictor":
                handle = module.register_forward_hook(partial(_note_outputs, found, length))
            else:
                note = _note_experts if kind == "experts" else _note_inputs
                handle = module.register_forward_pre_hook(partial(note, found, length))
            open_.callback(handle.remove)
        block.run(inputs, hidden, hidden)
    return [torch.cat(parts)[:, FIRST:].flatten(0, 1) for parts in seen]


def of_block(stage: Any, data: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    """The tensors of a run-time stage that belong to a block."""
    return {name: tensor for name, tensor in data.items() if name.startswith(f"{block}.")}


def _watched(block: Block, kind: Kind) -> list[nn.Module]:
    """What tells, of each MLP: experts, the projection whose outputs are masked, or the last one."""
    if kind == "experts":
        return far_experts(block.sites)
    mlps = far_mlps(block.module, block.sites, kind)
    return [(mlp.place.reads[0] if kind == "predictor" else mlp.columns).module for mlp in mlps]


def _note_inputs(found: list[Tensor], length: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    x = arguments[0]
    found.append(x.reshape(-1, length, x.shape[-1]) != 0)


def _note_outputs(
    found: list[Tensor], length: int, module: nn.Module, arguments: tuple[Any, ...], output: Tensor
) -> None:
    _note_inputs(found, length, module, (output,))


def _note_experts(found: list[Tensor], length: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    chosen, skip = arguments[1], skip_of(module)  # [samples * tokens, k]; with a skip a row for each expert that stays
    experts = len(module.get_parameter(DOWN))
    used = torch.zeros(len(chosen), experts, dtype=torch.bool).scatter(1, chosen, True)
    used = used if skip is None else skip.by_token(used.int()).bool()
    found.append(used.view(-1, length, experts))
