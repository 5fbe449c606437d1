"""Which configuration holds the sizes of a cut model, and which sizes none can hold."""

import pytest
from cut_models import CONFIGS

from families import build
from sparity.errors import InvalidInput
from sparity.models import Decoder


def test_resized_configurations():
    def resize(name, *blocks):
        config = CONFIGS[name]
        return Decoder.open(build(config)).family.resize(config, list(blocks))

    half, group = {"mlp_channels": 32}, {"kv_groups": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    assert resize("llama", half, half, half) == {"intermediate_size": 32}
    assert resize("llama", group, group, group) == heads
    assert resize("mixtral", group, group, group) == heads  # whose configuration had no head width
    assert resize("opt", half, half, half) == {"ffn_dim": 32}
    assert resize("gpt2", half, half, half) == {"n_inner": 32}
    assert resize("gpt2", {}, {"mlp_channels": 128}, {}) == {}
    assert resize("gpt_neox", half, half, half) == {"intermediate_size": 32}
    fewer = {"query_heads": 2}
    assert resize("llama, a key per query, biases", fewer, fewer, fewer) == {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    for name in CONFIGS:
        assert resize(name, {}, {}, {}) == {}


def test_a_list_of_one_size_per_block_takes_blocks_of_different_sizes():
    from transformers import Gemma3nTextConfig

    config = Gemma3nTextConfig(
        num_hidden_layers=3, intermediate_size=[64, 48, 64], activation_sparsity_pattern=[0.0] * 3
    )
    family = Decoder.open(build(CONFIGS["llama"])).family
    sizes = [{"mlp_channels": 32}, {}, {"mlp_channels": 64}]
    assert family.resize(config, sizes) == {"intermediate_size": [32, 48, 64]}


def test_what_a_configuration_cannot_express_is_refused():
    decoder = Decoder.open(build(CONFIGS["llama"]))
    config, family = decoder.config, decoder.family
    half = {"mlp_channels": 32}
    with pytest.raises(
        InvalidInput, match=r"intermediate_size would be 32 in blocks 0, 2; 64 in blocks 1, but .*keep as"
    ):
        family.resize(config, [half, {}, half])
    with pytest.raises(InvalidInput, match="sizes are given for 2 blocks, but the model has 3"):
        family.resize(config, [half, half])
    with pytest.raises(InvalidInput, match=r"block 1, mlp_channels: a new size lies between 1 and 64, not 65"):
        family.resize(config, [{}, {"mlp_channels": 65}, {}])
    with pytest.raises(InvalidInput, match=r"block 0, kv_groups: a new size lies between 1 and 2, not 0"):
        family.resize(config, [{"kv_groups": 0}] * 3)
    assert family.resize(config, [{"query_heads": 2}] * 3) == {"num_attention_heads": 2, "head_dim": 8}
    with pytest.raises(InvalidInput, match="3 query heads cannot be shared out equally among 2 key-value heads"):
        family.resize(config, [{"query_heads": 3}] * 3)
    with pytest.raises(InvalidInput, match="kv_groups take their query heads with them: cut query_heads before"):
        family.resize(config, [{"query_heads": 2, "kv_groups": 1}] * 3)
    with pytest.raises(InvalidInput, match=r'no dimension "hidden"; it has mlp_channels, kv_groups, query_heads'):
        family.resize(config, [{"hidden": 2}] * 3)
    three = Decoder.open(build(CONFIGS["llama, a key per query, biases"]))
    with pytest.raises(InvalidInput, match=r"num_attention_heads = 3.*32.* not a multiple .*: choose other sizes"):
        three.family.resize(three.config, [{"query_heads": 3}] * 3)
    with pytest.raises(
        InvalidInput, match=r'no dimension "kv_groups": every query head has a key-value head of its own'
    ):
        three.family.resize(three.config, [{"kv_groups": 2}] * 3)
    assert (config.intermediate_size, three.config.num_attention_heads) == (64, 4)
