"""Cut numbers out of the residual stream: out of projections that read or write it, norms, embedding and head."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models.block import Block, set_features
from sparity.models.cutting import cut_projections, tell_modules
from sparity.models.dimensions import HIDDEN, hidden_dimension
from sparity.models.families.base import Family

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")  # what configurations call it
MODULE_EPSILONS = ("variance_epsilon", "eps")


def declines_hidden(model: nn.Module, family: Family, blocks: list[Block]) -> str | None:
    """Why the hidden size of a model cannot be cut so that the zeroed model's logits stay; None where it can."""
    config: Any = model.config
    if not (family.takes_head_width and hasattr(config, "head_dim")):
        return f'a configuration of type "{config.model_type}" cannot say how wide a head is (no head_dim)'
    size = int(config.hidden_size)
    others = outside_blocks(model, family)
    modules = [*others, *(norm for block in blocks for norm in block_norms(block, size))]
    for module in modules:
        if isinstance(module, nn.Embedding | nn.Linear):
            if module.weight.shape[-1] != size:
                return f"a matrix outside the blocks, {list(module.weight.shape)}, does not end in the hidden size"
        elif not is_plain_rms(module, size):
            return (
                f"{type(module).__name__} is no plain RMSNorm: it would compute something else of fewer numbers (a "
                "mean is subtracted, or its weight counts from one)"
            )
    return None


def cut_hidden(model: nn.Module, family: Family, blocks: list[Block], kept: Tensor) -> dict[str, Any]:
    """Keep only some numbers of the residual stream, in place; the configuration's attributes that change.

    The norms divide by the root mean square of what is left, so their weights take the factor that makes them compute
    what they compute where the others are zero: sqrt(old / new), and their epsilon old / new.

    Raises:
        InvalidInput: the model cannot be cut so (`declines_hidden`).
    """
    reason = declines_hidden(model, family, blocks)
    if reason:
        raise InvalidInput(f"{HIDDEN}: {reason}: cut other dimensions")
    config: Any = model.config
    size, left = int(config.hidden_size), len(kept)
    changes: dict[str, Any] = {"hidden_size": left, "head_dim": family.head_width(config)}
    changes |= {name: getattr(config, name) * size / left for name in EPSILONS if hasattr(config, name)}
    norms = [norm for block in blocks for norm in block_norms(block, size)]
    for block in blocks:
        cut_projections(block.projections, [hidden_dimension(block.projections, size)], {HIDDEN: kept})
        for router in routers(block):
            _replace(router, "weight", router.get_parameter("weight").data[:, kept], {})
    done: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for module in outside_blocks(model, family):
        if isinstance(module, nn.Embedding | nn.Linear):
            _replace(module, "weight", module.weight.data[:, kept.to(module.weight.device)], done)
            if isinstance(module, nn.Embedding):
                module.embedding_dim = left
            else:
                set_features(module, *module.weight.shape)
        else:
            norms.append(module)
    for norm in norms:
        weight = norm.get_parameter("weight").data
        _replace(norm, "weight", weight[kept.to(weight.device)] * math.sqrt(size / left), {})
    for module in model.modules():  # all read one epsilon from the configuration
        _scale_epsilon(module, size / left)
    tell_modules(model, changes)
    return changes


def set_norm(norm: nn.Module, weight: Tensor, size: int) -> None:
    """Let a norm of `size` numbers see only as many as `weight` has, and compute of them what it computed with all."""
    _replace(norm, "weight", weight * math.sqrt(size / len(weight)), {})
    _scale_epsilon(norm, size / len(weight))


def _scale_epsilon(module: nn.Module, factor: float) -> None:
    for name in MODULE_EPSILONS:
        if isinstance(module.__dict__.get(name), float):
            setattr(module, name, module.__dict__[name] * factor)


def routers(block: Block) -> list[nn.Module]:
    """The modules of a block that choose experts: they hold a matrix `[experts, hidden]` of their own."""
    experts = [projection.module for projection in block.projections if projection.expert is not None]
    if not experts:
        return []
    found = []
    for path, module in block.module.named_modules():
        weight = module._parameters.get("weight")
        beside = any(child in experts for child in block.module.get_submodule(path.rpartition(".")[0]).children())
        if weight is not None and weight.ndim == 2 and beside:
            found.append(module)
    return found


def is_plain_rms(norm: nn.Module, size: int) -> bool:
    """Whether a module computes weight * x / sqrt(mean(x^2) + epsilon), tried on numbers; its weights may be absent."""
    weight = norm._parameters.get("weight")
    epsilon = next((norm.__dict__[name] for name in MODULE_EPSILONS if name in norm.__dict__), None)
    if weight is None or weight.shape != (size,) or norm._parameters.get("bias") is not None or epsilon is None:
        return False
    tried = copy.deepcopy(norm).to_empty(device="cpu").float()
    factors, x = torch.linspace(0.5, 1.5, size), torch.linspace(0.2, 3.0, size)[None]
    with torch.no_grad():
        tried.get_parameter("weight").copy_(factors)
        found = tried(x)
    return bool(torch.allclose(found, x * torch.rsqrt(x.square().mean() + epsilon) * factors, rtol=1e-4))


def block_norms(block: Block, size: int) -> list[nn.Module]:
    """The modules of a block with parameters of their own that see the residual stream."""
    known = {projection.module for projection in block.projections} | set(routers(block))
    paths = {module: path for path, module in block.module.named_modules()}
    attention = [paths[p.module].rpartition(".")[0] for p in block.projections if p.role in ("o", "q", "qkv")]
    inside = tuple(f"{path}." for path in attention if path)
    return [
        module
        for module, path in paths.items()
        if module not in known and module._parameters and not f"{path}.".startswith(inside or ("\0",))
    ]


def outside_blocks(model: nn.Module, family: Family) -> list[nn.Module]:
    """The modules with parameters of their own that lie outside the blocks."""
    prefix = f"{family.blocks}."
    return [
        module
        for path, module in model.named_modules()
        if not path.startswith(prefix) and any(value is not None for value in module._parameters.values())
    ]


def _replace(module: nn.Module, name: str, value: Tensor, done: dict[nn.Parameter, nn.Parameter]) -> None:
    old = module.get_parameter(name)
    if old not in done:
        done[old] = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    module._parameters[name] = done[old]
