"""Blocks of different sizes: what the configuration says of them, and that what is written is what is read."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_models import TOKENS, logits, varied

import sparity
from families import build, tiny_configs
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models import transformers as hf
from sparity.models.cuts.whole import ragged_problem, stock_problem
from sparity.models.ragged import block_config, is_ragged, ragged_config, stated_sizes

KEPT = {
    "mlp_channels": [range(5), None, range(10, 64)],
    "kv_groups": [None, [1], None],
    "query_heads": [[0, 2], None, None],
}
SAID = [(5, 2, 2), (64, 2, 1), (54, 4, 2)]  # channels, query heads, key-value heads


@pytest.fixture(scope="module")
def ragged():
    return sparity.cut(varied(build(tiny_configs()["llama"], seed=3)), KEPT)


def sizes(config):
    blocks = [block_config(config, index) for index in range(3)]
    return [(b.intermediate_size, b.num_attention_heads, b.num_key_value_heads) for b in blocks]


def test_a_configuration_says_each_blocks_sizes_and_globally_the_largest(ragged):
    config = ragged.config
    assert is_ragged(config)
    assert sizes(config) == SAID
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (64, 4, 2)
    assert config.head_dim == 8
    assert ragged_problem(ragged) is None
    assert stock_problem(ragged) == (
        "model.layers.0.mlp.down_proj.weight is [32, 5], but the configuration says [32, 64]"
    )


def test_it_is_written_and_read_back_bit_for_bit(ragged, tmp_path):
    ragged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["per_layer_config"] == {
        "0": {"intermediate_size": 5, "num_attention_heads": 2},
        "1": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "2": {"intermediate_size": 54},
    }
    again = sparity.load(tmp_path)
    assert sizes(again.config) == SAID
    assert type(again).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(again), logits(ragged))
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(again.generate(TOKENS[:1], **given), ragged.generate(TOKENS[:1], **given))
    decoder = Decoder.open(tmp_path)
    found = [{d.name: d.size for d in decoder.dimensions(index)} for index in range(3)]
    assert found == [
        {"mlp_channels": 5, "query_heads": 2},
        {"mlp_channels": 64, "kv_groups": 1},
        {"mlp_channels": 54, "kv_groups": 2},
    ]


def test_attention_is_computed_by_one_implementation_in_all_blocks(ragged):
    for model in (ragged, copy.deepcopy(ragged)):
        model.set_attn_implementation("eager")
        assert {block.self_attn.config._attn_implementation for block in model.model.layers} == {"eager"}
        assert torch.allclose(logits(model), logits(ragged), atol=1e-5)
        model.set_attn_implementation("sdpa")


def test_cut_again_it_says_what_is_left(ragged):
    shallow = sparity.cut(ragged, {"depth": [0, 2]})
    assert is_ragged(shallow.config)
    assert [block_config(shallow.config, i).intermediate_size for i in range(2)] == [5, 54]
    assert ragged_problem(shallow) is None
    one = sparity.cut(ragged, {"depth": [2]})
    assert not is_ragged(one.config)
    assert stock_problem(one) is None
    assert "per_layer_config" not in one.config.to_dict()
    narrow = sparity.cut(ragged, {"mlp_channels": [range(3)] * 3})
    assert [size[0] for size in sizes(narrow.config)] == [3, 3, 3]
    assert ragged_problem(narrow) is None


def test_a_recipe_does_not_cut_blocks_that_differ_already(ragged):
    decoder = Decoder.open(ragged)
    with pytest.raises(InvalidInput, match="blocks of this model have different sizes already"):
        decoder.resized([{"mlp_channels": 4}] * 3)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.sampled_from([(4, 2), (4, 4), (2, 1), (2, 2)])), min_size=3, max_size=3)
)
def test_any_sizes_are_built_as_they_are_said(wanted):
    config = tiny_configs()["llama"]
    config.head_dim = 8
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert stated_sizes(config) == list(names)
    blocks = [dict(zip(names, (width, *heads), strict=True)) for width, heads in wanted]
    made = ragged_config(config, blocks)
    assert is_ragged(made) == any(block != blocks[0] for block in blocks)
    assert sizes(made) == [tuple(block.values()) for block in blocks]
    model = hf.outline_model(made)
    for block, (width, (heads, key_heads)) in zip(model.model.layers, wanted, strict=True):
        assert block.mlp.down_proj.weight.shape == (32, width)
        assert block.self_attn.q_proj.weight.shape == (8 * heads, 32)
        assert block.self_attn.k_proj.weight.shape == (8 * key_heads, 32)
        assert block.self_attn.num_key_value_groups == heads // key_heads
