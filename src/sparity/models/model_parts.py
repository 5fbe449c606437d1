"""The parts of a model that can be changed by themselves, and what they weigh."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sparity.models.block import Projection
from sparity.models.decoder import Decoder

ATTENTION = ("q", "k", "v", "o", "qkv")
Kind = Literal["layer", "attention", "mlp"]


@dataclass(frozen=True)
class Part:
    """Some projections: one layer (or that layer of all experts of a block), or one half of a block or of all blocks.

    `block` is None for all blocks. `flops` counts the multiplications and additions of these projections per token, of
    experts only as many as a token visits.
    """

    kind: Kind
    name: str
    block: int | None
    role: str
    projections: tuple[str, ...]
    parameters: int
    flops: float


def parts(decoder: Decoder) -> Iterator[Part]:
    """Every layer, every block's attention and MLP, and the attention and the MLPs of all blocks."""
    everywhere: dict[Kind, list[Projection]] = {"attention": [], "mlp": []}
    for index in range(len(decoder)):
        by_role: dict[str, list[Projection]] = {}
        halves: dict[Kind, list[Projection]] = {"attention": [], "mlp": []}
        for projection in (projection for site in decoder.sites(index) for projection in site.projections):
            by_role.setdefault(projection.role, []).append(projection)
            halves["attention" if projection.role in ATTENTION else "mlp"].append(projection)
        for role, found in by_role.items():
            name = found[0].name if len(found) == 1 else f"{decoder.block_name(index)}: {role} of all experts"
            yield _part(decoder, "layer", name, index, role, found)
        for kind, found in halves.items():
            everywhere[kind] += found
            if found:
                yield _part(decoder, kind, f"{decoder.block_name(index)}: {kind}", index, kind, found)
    for kind, found in everywhere.items():
        if found:
            yield _part(decoder, kind, f"{kind} of all blocks", None, kind, found)


def model_flops(decoder: Decoder, length: int) -> float:
    """Multiplications and additions per token of a forward pass over `length` tokens, on average.

    All projections, the head, and attention over the half of the other tokens that a token sees.
    """
    config = decoder.config
    projections = sum(part.flops for part in parts(decoder) if part.kind == "layer")
    width = int(config.num_attention_heads) * decoder.family.head_width(config)
    attention = len(decoder) * 2 * 2 * width * length / 2
    return float(projections + attention + 2 * int(config.hidden_size) * int(config.vocab_size))


def _part(decoder: Decoder, kind: Kind, name: str, block: int | None, role: str, found: list[Projection]) -> Part:
    return Part(
        kind=kind,
        name=name,
        block=block,
        role=role,
        projections=tuple(projection.name for projection in found),
        parameters=sum(projection.weight.numel() for projection in found),
        flops=sum(2 * projection.weight.numel() * visited(decoder, projection) for projection in found),
    )


def visited(decoder: Decoder, projection: Projection) -> float:
    """The share of tokens that pass through a projection: all, or those that a router sends to an expert."""
    if projection.expert is None:
        return 1.0
    config = decoder.config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return float(config.num_experts_per_tok / experts)
