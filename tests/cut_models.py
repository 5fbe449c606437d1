"""Tiny models to cut, which units of them stay, and the dense model with the others set to zero."""

import copy

import torch

from families import tiny_configs

HEADS = ("kv_groups", "query_heads")
DERIVED_HEAD_WIDTH = (
    "qwen2",
    "phi3",
    "opt",
    "gpt_neox",
    "gpt2",
)  # hidden size / heads, head_dim cannot be written down


def configs():
    """The tiny families, and variants that have heads of the other kind, biases, or a stated head width."""
    found = tiny_configs()
    llama = copy.deepcopy(found["llama"])
    llama.num_key_value_heads, llama.attention_bias, llama.mlp_bias = 4, True, True
    for name in ("qwen2", "phi3"):  # their models read a head_dim that their classes do not declare
        found[f"{name}, head_dim"] = copy.deepcopy(found[name])
        found[f"{name}, head_dim"].head_dim = 8
    return {**found, "llama, a key per query, biases": llama}


CONFIGS = configs()


def units(dimension, seed=0):
    """Half of a dimension's units, chosen at random, in order."""
    generator = torch.Generator().manual_seed(seed + sum(dimension.name.encode()))
    return torch.randperm(dimension.size, generator=generator)[: dimension.size // 2].sort().values


def kinds(decoder):
    """The dimensions of a model, those of experts as one."""
    return dict.fromkeys(d.name.split(".")[0] for i in range(len(decoder)) for d in decoder.dimensions(i))


def choice(decoder, kind, seed=0):
    """For each block, half of the units of all its dimensions of a kind, other ones in each block and expert."""
    return [
        {d.name: units(d, seed + 7 * index) for d in decoder.dimensions(index) if d.name.split(".")[0] == kind}
        for index in range(len(decoder))
    ]


def sizes(kept):
    return [{name: len(indices) for name, indices in block.items()} for block in kept]


def zeroed(model, decoder, kept):
    """A copy of the dense model with the rows, biases and columns of the units that go set to zero."""
    model = copy.deepcopy(model)
    for index, block in enumerate(kept):
        name = decoder.block_name(index)
        sites = decoder.family.sites(model.get_submodule(name), name, decoder.config)
        projections = {p.name: p for site in sites for p in site.projections}
        for dimension in decoder.dimensions(index):
            stays = block.get(dimension.name, torch.arange(dimension.size))
            gone = [unit for unit in range(dimension.size) if unit not in stays]
            for cut in dimension.cuts:
                projection = projections[cut.projection]
                places = torch.tensor(
                    [unit * cut.width + i for unit in gone for i in range(cut.width)], dtype=torch.long
                )
                if cut.axis == "columns":
                    projection.weight[:, places] = 0
                    continue
                projection.weight[places] = 0
                if getattr(projection.module, "bias", None) is not None:
                    projection.module.bias.data[places + (projection.rows or (0, 0))[0]] = 0
    return model
