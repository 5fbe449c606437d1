"""What a GGUF file says of a model, read back by the gguf package: llama for one size, deci for sizes by block."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import sparity
from families import build, tiny_configs
from gguf_models import tiny_llama
from sparity.errors import InvalidInput, UnsupportedModel
from sparity.models.gguf_export import export_gguf, word_rule
from sparity.models.gguf_writer import rotated, silent_blocks, write_gguf

RAGGED = {"mlp_channels": [range(32), None, None], "kv_groups": [None, [1], None]}


def written(model, path, kind=Type.F32):
    write_gguf(model, path, kind)
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {tensor.name: tensor for tensor in reader.tensors}


def test_blocks_of_one_size_are_a_llama_whose_head_width_is_said(tmp_path):
    model = sparity.cut(tiny_llama(head_dim=8), {"hidden_size": range(24)})
    values, tensors = written(model, tmp_path / "a.gguf")
    assert values["general.architecture"] == "llama"
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert values[f"llama.{name}"] == 8
    assert (values["llama.attention.head_count"], values["llama.attention.head_count_kv"]) == (4, 2)
    assert values["llama.feed_forward_length"] == 64
    assert np.array_equal(tensors["blk.0.ffn_down.weight"].data, model.model.layers[0].mlp.down_proj.weight.detach())


def test_blocks_that_differ_are_a_deci_with_lists(tmp_path):
    model = sparity.cut(tiny_llama(num_hidden_layers=3), RAGGED)
    values, tensors = written(model, tmp_path / "a.gguf")
    assert values["general.architecture"] == "deci"
    assert values["deci.feed_forward_length"] == [32, 64, 64]
    assert values["deci.attention.head_count"] == [4, 2, 4]
    assert values["deci.attention.head_count_kv"] == [2, 1, 2]
    assert values["deci.block_count"] == 3
    query = model.model.layers[1].self_attn.q_proj.weight.detach()
    assert np.array_equal(tensors["blk.1.attn_q.weight"].data, rotated(query, 2))
    assert rotated(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # of a head 0 1 | 2 3 the halves interleave


def test_attention_that_adds_nothing_is_left_out_but_in_the_first_block(tmp_path):
    model = sparity.cut(tiny_llama(num_hidden_layers=3), {"attention": [2]})
    assert silent_blocks(model) == {1}
    values, tensors = written(model, tmp_path / "a.gguf")
    assert values["deci.attention.head_count"] == [4, 0, 4]
    assert values["deci.attention.head_count_kv"] == [2, 0, 2]
    assert "blk.1.attn_norm.weight" not in tensors
    assert "blk.1.attn_q.weight" not in tensors
    assert "blk.1.ffn_norm.weight" in tensors
    assert "blk.0.attn_q.weight" in tensors


def test_biases_are_written_in_the_order_of_their_rows(tmp_path):
    model = build(tiny_llama(attention_bias=True, mlp_bias=True).config)
    _, tensors = written(model, tmp_path / "a.gguf")
    attention = model.model.layers[1].self_attn
    assert np.array_equal(tensors["blk.1.attn_q.bias"].data, rotated(attention.q_proj.bias.detach(), 4))
    assert np.array_equal(tensors["blk.1.attn_output.bias"].data, attention.o_proj.bias.detach())


def test_rows_that_a_type_cannot_hold_stay_in_16_bits(tmp_path):
    model = sparity.cut(tiny_llama(), {"mlp_channels": [range(40)] * 2})
    _, tensors = written(model, tmp_path / "a.gguf", Type.Q8_0)
    assert tensors["blk.0.ffn_down.weight"].tensor_type == Type.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == Type.Q8_0


def test_what_it_cannot_say_is_refused(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for model, words in (
        (build(tiny_configs()["qwen3"]), "only Llamas with SiLU"),
        (build(tiny_llama(rope_parameters=scaled).config), "rotary positions that are scaled"),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            write_gguf(model, tmp_path / "a.gguf")


def test_a_checkpoint_goes_there_and_back_with_its_tokenizer(tmp_path):
    file = tmp_path / "llama.gguf"
    export_gguf("zoo:llama", file)
    with pytest.raises(InvalidInput, match="is there already: --force replaces it"):
        export_gguf("zoo:llama", file)
    dense, again = sparity.load("zoo:llama"), sparity.load(file)
    assert torch.equal(again.model.layers[3].self_attn.q_proj.weight, dense.model.layers[3].self_attn.q_proj.weight)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, dense(ids).logits)
    text = "def f(x):\n    return x + 12 # ä <|endoftext|>"
    ours, theirs = (sparity.models.loading.load_tokenizer(path) for path in ("zoo:llama", file))
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]


def test_a_rule_of_cutting_words_without_a_known_name_is_refused():
    bpe = {"model": {"type": "BPE"}, "normalizer": None}
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]
    assert word_rule({**bpe, "pre_tokenizer": {"type": "Sequence", "pretokenizers": digits}}) == "smollm"
    assert word_rule({**bpe, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}) == "gpt-2"
    with pytest.raises(UnsupportedModel, match=r"Metaspace.*convert_hf_to_gguf"):
        word_rule({**bpe, "pre_tokenizer": {"type": "Metaspace"}})
    with pytest.raises(UnsupportedModel, match="only byte-level BPE"):
        word_rule({"model": {"type": "Unigram"}, "pre_tokenizer": None})
