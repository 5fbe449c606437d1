"""Cutting units out of a block: by hand, what is refused, and the laws of a cut."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from cut_models import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from families import build
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.models.cutting import cut_block
from sparity.models.dimensions import Cut, Dimension, cut_matrix
from sparity.models.transformers import resized_config


@pytest.fixture(scope="module")
def decoders():
    """A model per way in which parameters are stored."""
    names = ("llama", "gpt2", "phi3, head_dim", "mixtral", "llama, a key per query, biases")
    return {name: Decoder.open(build(CONFIGS[name])) for name in names}


@contextmanager
def numbered(decoder, index):
    """A block whose every stored weight is 1000 * row + column, as `[out, in]`, and every bias its row."""
    with decoder.block(index) as block:
        for projection in block.projections:
            rows, columns = projection.weight.shape
            start = (projection.rows or (0, 0))[0]
            projection.write(1000.0 * torch.arange(start, start + rows)[:, None] + torch.arange(columns))
            bias = getattr(projection.module, "bias", None)
            if bias is not None:
                bias.data.copy_(torch.arange(len(bias)))
        yield block


def test_by_hand_gpt2():
    decoder = Decoder.open(build(CONFIGS["gpt2"]))
    with numbered(decoder, 1) as block:
        cut_block(block, {"mlp_channels": torch.tensor([2, 5, 127])}, decoder.family, decoder.config)
        mlp = block.module.mlp
        assert mlp.c_fc.weight.shape == (32, 3)  # Conv1D: [in, out]
        assert mlp.c_fc.weight[7].tolist() == [2007, 5007, 127007]
        assert mlp.c_fc.bias.tolist() == [2, 5, 127]
        assert mlp.c_proj.weight.shape == (3, 32)
        assert mlp.c_proj.weight[:, 4].tolist() == [4002, 4005, 4127]
        assert mlp.c_proj.bias.tolist() == list(range(32))
        assert (mlp.c_fc.nf, mlp.c_fc.nx, mlp.c_proj.nf, mlp.c_proj.nx) == (3, 32, 32, 3)
        assert mlp.c_fc.weight.is_contiguous()
    heads = decoder.dimensions(1)[1]
    name = "transformer.h.1.attn"
    assert heads == Dimension(
        "query_heads",
        4,
        (*(Cut(f"{name}.c_attn.{role}", "rows", 8) for role in "qkv"), Cut(f"{name}.c_proj", "columns", 8)),
    )


def test_by_hand_phi3():
    config = CONFIGS["phi3, head_dim"]
    decoder = Decoder.open(build(config))
    with numbered(decoder, 0) as block:
        cut_block(
            block,
            {"mlp_channels": torch.tensor([0, 63]), "kv_groups": torch.tensor([1])},
            decoder.family,
            decoder.config,
        )
        attention, mlp = block.module.self_attn, block.module.mlp
        assert (mlp.gate_up_proj.weight[:, 3]).tolist() == [3, 63003, 64003, 127003]  # up follows 64 rows of gate
        assert (mlp.down_proj.weight[5]).tolist() == [5000, 5063]
        # group 1: query heads 2 and 3 of rows 0 to 31, its key of rows 32 to 47, its value of rows 48 to 63
        rows = [*range(16, 32), *range(40, 48), *range(56, 64)]
        assert attention.qkv_proj.weight[:, 0].tolist() == [1000 * row for row in rows]
        assert attention.o_proj.weight[1].tolist() == [1000 + column for column in range(16, 32)]
        assert (attention.qkv_proj.out_features, attention.o_proj.in_features) == (32, 16)
        assert (attention.config.num_attention_heads, attention.num_key_value_heads) == (2, 1)
        assert (decoder.config.num_attention_heads, block.module.self_attn.config is decoder.config) == (4, False)


def test_by_hand_mixtral():
    decoder = Decoder.open(build(CONFIGS["mixtral"]))
    with numbered(decoder, 2) as block:
        kept = {f"mlp_channels.{expert}": torch.tensor([expert, 10 + expert]) for expert in range(4)}
        cut = cut_block(block, kept, decoder.family, decoder.config)
        experts = block.module.mlp.experts
        assert (experts.gate_up_proj.shape, experts.down_proj.shape) == ((4, 4, 32), (4, 32, 2))
        assert experts.gate_up_proj[3, :, 1].tolist() == [3001, 13001, 67001, 77001]
        assert experts.down_proj[2, 6].tolist() == [6002, 6012]
        assert experts.intermediate_dim == 2
        stored = decoder.export(cut)
        place = "model.layers.2.block_sparse_moe"
        assert stored[f"{place}.experts.1.w1.weight"][:, 0].tolist() == [1000, 11000]
        assert stored[f"{place}.experts.1.w3.weight"][:, 0].tolist() == [65000, 75000]
        assert stored[f"{place}.experts.1.w2.weight"].shape == (32, 2)
        assert stored[f"{place}.gate.weight"].shape == (4, 32)  # the router stays


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([], "no unit is kept"),
        ([3, 1], "unsorted or repeated"),
        ([1, 1], "unsorted or repeated"),
        ([-1, 2], "run from -1 to 2, but there are only 0 to 63"),
        ([0, 64], "run from 0 to 64, but there are only 0 to 63"),
    ],
)
def test_indices_that_choose_no_units_are_refused(indices, words):
    decoder = Decoder.open(build(CONFIGS["llama"]))
    kept = {"kv_groups": torch.tensor([0]), "mlp_channels": torch.tensor(indices, dtype=torch.int64)}
    with decoder.block(0) as block:
        before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
        with pytest.raises(InvalidInput, match=rf"model\.layers\.0, mlp_channels: .*{words}"):
            cut_block(block, kept, decoder.family, decoder.config)
        after = block.module.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_other_kept_values_are_refused():
    decoder = Decoder.open(build(CONFIGS["mixtral"]))

    def cut(kept):
        with decoder.block(0) as block:
            cut_block(block, kept, decoder.family, decoder.config)

    with pytest.raises(InvalidInput, match=r"vector of int64, not torch\.bool"):
        cut({"kv_groups": torch.tensor([True, False])})
    with pytest.raises(InvalidInput, match=r"vector of int64, not torch\.int64 \[1, 1\]"):
        cut({"kv_groups": torch.tensor([[0]])})
    with pytest.raises(InvalidInput, match=r'layers\.0 has no dimension "mlp_channels": it has mlp_channels\.0, '):
        cut({"mlp_channels": torch.tensor([0])})
    uneven = {f"mlp_channels.{expert}": torch.arange(8 + expert % 2) for expert in range(4)}
    with pytest.raises(InvalidInput, match=r"block 0: its experts would have 8, 9, 8, 9 channels.*keep equally many"):
        cut(uneven)
    with pytest.raises(InvalidInput, match=r"would have 8, 64, 64, 64 channels"):
        cut({"mlp_channels.0": torch.arange(8)})


def test_one_projection_is_replaced_only_where_it_owns_its_parameter():
    decoder = Decoder.open(build(CONFIGS["gpt2"]))
    with decoder.block(0) as block:
        roles = {projection.role: projection for projection in block.projections}
        roles["fc1"].replace(torch.ones(5, 32, dtype=torch.float64), torch.arange(5))
        conv = block.module.mlp.c_fc
        assert (conv.weight.shape, conv.nf, conv.nx, conv.weight.dtype) == ((32, 5), 5, 32, torch.float32)
        assert conv.bias.tolist() == [0, 1, 2, 3, 4]
        roles["fc2"].replace(torch.ones(32, 5))  # its bias stays
        assert block.module.mlp(torch.zeros(1, 1, 32)).shape == (1, 1, 32)
        with pytest.raises(InvalidInput, match=r"a weight \[4, 32\] needs a bias of 4 numbers, not \[5\]"):
            roles["fc1"].replace(torch.ones(4, 32))
        with pytest.raises(InvalidInput, match=r"c_attn\.q shares its stored parameter with other projections"):
            roles["q"].replace(torch.ones(8, 32))
    with Decoder.open(build(CONFIGS["mixtral"])).block(0) as block:
        with pytest.raises(InvalidInput, match="shares its stored parameter"):
            block.projections[-1].replace(torch.ones(32, 5))
        with pytest.raises(InvalidInput, match="q_proj has no bias"):
            block.projections[0].replace(torch.ones(32, 32), torch.ones(32))
        block.projections[0].replace(torch.ones(8, 32))
        assert block.module.self_attn.q_proj.out_features == 8
        assert not block.module.self_attn.q_proj.weight.requires_grad


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_cutting_twice_is_cutting_once_by_the_composed_indices(decoders, data):
    name = data.draw(st.sampled_from(sorted(decoders)))
    decoder = decoders[name]
    family = decoder.family
    first_count, second_count = sorted(data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12))), reverse=True)
    counts = {"mlp_channels": (first_count, second_count), "query_heads": (2, 1), "kv_groups": (1, 1)}

    def draw(dimensions, cut):
        kept = {}
        for dimension in dimensions:
            if name == "gpt2" and dimension.name == "query_heads":
                continue
            count = counts[dimension.name.split(".")[0]][cut]
            chosen = st.sets(st.integers(0, dimension.size - 1), min_size=count, max_size=count)
            kept[dimension.name] = torch.tensor(sorted(data.draw(chosen)))
        return kept

    def resized(config, kept):
        changes = family.resize_block(config, 0, {dimension: len(units) for dimension, units in kept.items()})
        return resized_config(config, changes)

    with decoder.block(0) as block, decoder.block(0) as other:
        first = draw(decoder.dimensions(0), 0)
        once = cut_block(block, first, family, decoder.config)
        config = resized(decoder.config, first)
        second = draw(family.dimensions(once.module, once.name, config), 1)
        twice = cut_block(once, second, family, config)
        composed = {dimension: first[dimension][units] for dimension, units in second.items()}
        straight = cut_block(other, composed, family, decoder.config)
        left, right = twice.module.state_dict(), straight.module.state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[key]) for key, tensor in left.items())
        assert [p.weight.shape for p in twice.projections] == [p.weight.shape for p in straight.projections]
        after = family.dimensions(twice.module, twice.name, resized(config, second))
        assert {d.name: d.size for d in after if d.name in second} == {d: len(units) for d, units in second.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_every_unit_changes_no_bit(name):
    decoder = Decoder.open(build(CONFIGS[name]))
    with decoder.block(0) as block, decoder.block(0) as other:
        kept = {d.name: torch.arange(d.size) for d in decoder.dimensions(0)}
        cut = decoder.export(cut_block(block, kept, decoder.family, decoder.config))
        whole = decoder.export(other)
        assert cut.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[key]) for key, tensor in cut.items())


def test_a_mask_follows_its_projection_through_a_cut():
    cuts = {"mlp_channels": Cut("p", "rows", 1), "heads": Cut("p", "columns", 2)}
    mask = torch.arange(24).reshape(4, 6) % 5 == 0
    kept = {"mlp_channels": torch.tensor([0, 3]), "heads": torch.tensor([1])}
    assert cut_matrix(mask, cuts, kept).tolist() == [[False, False], [True, False]]  # numbers 2, 3 and 20, 21
    assert torch.equal(cut_matrix(mask, cuts, {}), mask)


@pytest.mark.parametrize("name", ["phi3, head_dim", "mixtral"])
def test_parts_of_a_fused_matrix_stay_in_their_stored_order(decoders, name):
    decoder = decoders[name]
    kept = {d.name: torch.arange(d.size)[: d.size // 2] for d in decoder.dimensions(0)}
    with decoder.block(0) as block, decoder.block(0) as other:
        backwards = tuple(replace(site, projections=site.projections[::-1]) for site in other.sites[::-1])
        cut_block(block, kept, decoder.family, decoder.config)
        cut_block(replace(other, sites=backwards), kept, decoder.family, decoder.config)
        stored = other.module.state_dict()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in block.module.state_dict().items())


def test_a_cut_needs_no_weights_in_memory_and_keeps_their_type(decoders):
    decoder = decoders["llama"]
    kept = {"mlp_channels": torch.arange(5), "kv_groups": torch.tensor([1])}
    name = decoder.block_name(0)
    module = copy.deepcopy(decoder.skeleton.get_submodule(name)).to(torch.bfloat16)
    cut = cut_block(
        Block(0, name, module, decoder.family.sites(module, name, decoder.config)), kept, decoder.family, decoder.config
    )
    shapes = [tuple(projection.weight.shape) for projection in cut.projections]
    assert shapes == [(16, 32), (8, 32), (8, 32), (32, 16), (5, 32), (5, 32), (32, 5)]
    assert {(p.weight.device.type, p.weight.dtype) for p in cut.projections} == {("meta", torch.bfloat16)}
