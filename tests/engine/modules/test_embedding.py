"""Packed embeddings and heads: the rows of the dense weight, in memory once, saved and loaded, and taken back."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import sparity
from packed_folders import TOKENS, change, logits, same, tensors
from sparity.engine.modules.embedding import PackedEmbedding, PackedHead
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import build_encoding, build_format, unpack
from sparity.measure.timing.contenders import held_bytes, hold_dense
from sparity.models import Decoder
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify

ENCODINGS = ["int8", {"int4": {"group": 32}}, {"int4": {"group": 64, "symmetric": False}}]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 97}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@pytest.fixture(params=[True, False], ids=["tied", "apart"])
def model(request):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=request.param)).bfloat16().eval()


@pytest.fixture
def plain(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def rounded(weight, encoding):
    encoding = build_encoding(encoding)
    return encoding.decode(*encoding.encode(weight.detach()), torch.bfloat16)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_rows_are_those_of_the_unpacked_weight(encoding):
    weight = torch.randn(11, 64).bfloat16()
    embedding = PackedEmbedding("embed", 11, 64)
    embedding.give(build_format("dense").pack(weight, encoding))
    ids = torch.tensor([[10, 0, 3], [3, 7, 7]])
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, rounded(weight, encoding)))
    assert torch.equal(embedding.weight, rounded(weight, encoding))
    assert embedding(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 64)
    for wrong in (11, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([wrong]))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_embedding_and_head_are_rounded_and_nothing_else(encoding, model):
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.model.embed_tokens.weight.copy_(rounded(model.model.embed_tokens.weight, encoding))
        expected.lm_head.weight.copy_(rounded(model.lm_head.weight, encoding))
    tied = model.config.tie_word_embeddings
    sparity.attach(model, embeddings=encoding)
    assert (type(model.model.embed_tokens), type(model.lm_head)) == (PackedEmbedding, PackedHead)
    assert (model.lm_head.packed is model.model.embed_tokens.packed) == tied
    state = model.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], expected.model.embed_tokens.weight)
    assert torch.equal(state["lm_head.weight"], expected.lm_head.weight)
    torch.testing.assert_close(logits(model), logits(expected), atol=0.02, rtol=0.05)
    own = {id(layer.packed): layer.packed.nbytes for layer in (model.lm_head, model.model.embed_tokens)}
    assert held_bytes(model) == sum(own.values()) + sum(parameter.nbytes for parameter in model.parameters()) + sum(
        buffer.nbytes for buffer in model.buffers()
    )
    assert len(own) == (1 if tied else 2)


def test_a_token_gets_the_logits_that_it_gets_alone(model):
    sparity.attach(model, embeddings="int8")
    x = torch.randn(40, 64).bfloat16()
    together = model.lm_head(x)
    assert all(torch.equal(model.lm_head(x[i : i + 1])[0], together[i]) for i in range(len(x)))


def test_taken_back_bit_for_bit(model):
    before, tied = {name: value.clone() for name, value in model.state_dict().items()}, model.config.tie_word_embeddings
    with sparity.attached(model, values="int8", embeddings="int8"):
        assert type(model.lm_head) is PackedHead
    assert type(model.lm_head) is nn.Linear
    assert same(before, model.state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.tie_weights()
    assert same(before, model.state_dict())


def test_held_dense_again(model):
    sparity.attach(model, embeddings="int8")
    found = model.state_dict()
    sparity.engine.decoding.model.disable_fast_path(model)
    hold_dense(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert same(found, model.state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("encoding", ENCODINGS[:2], ids=str)
def test_packed_on_disk_loaded_saved_and_made_plain(encoding, plain, tmp_path):
    assert convert(plain, tmp_path / "packed", embeddings=encoding) == "packed"
    expected = tensors(plain)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & expected.keys():
        expected[name] = rounded(expected[name], encoding)
    assert same(tensors(tmp_path / "packed"), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert (type(loaded.model.embed_tokens), type(loaded.lm_head)) == (PackedEmbedding, PackedHead)
    reference = sparity.attach(sparity.load(plain), embeddings=encoding)
    assert torch.equal(logits(loaded), logits(reference))
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(loaded))
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(TOKENS[:, :5], **greedy), reference.generate(TOKENS[:, :5], **greedy))
    loaded.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), expected)
    assert torch.equal(logits(sparity.load(tmp_path / "again")), logits(loaded))
    convert(tmp_path / "packed", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), expected)
    base = AutoModel.from_pretrained(tmp_path / "packed")
    assert type(base.embed_tokens) is PackedEmbedding
    assert torch.equal(base(TOKENS).last_hidden_state, loaded.model(TOKENS).last_hidden_state)


def test_a_recipe_asks_for_it(model, tmp_path):
    recipe = {"dtype": "bfloat16", "stages": [{"prune": {"score": "magnitude", "pattern": "2:4"}}]}
    recipe |= {"measure": {"speed": None, "perplexity": []}, "output": {"format": "packed", "embeddings": "int8"}}
    result = sparity.run(recipe, model=model, output=tmp_path / "out", device="cpu")
    assert verify(result.path).problems == ()
    found = sparity.load(result.path)
    assert type(found.model.embed_tokens) is PackedEmbedding
    assert torch.equal(found.model.embed_tokens.weight, rounded(model.model.embed_tokens.weight, "int8"))


def test_what_is_refused(model, plain, tmp_path):
    with pytest.raises(InvalidInput, match=r"embed_tokens.*groups of 128 do not divide a row of 64"):
        sparity.attach(model, embeddings={"int4": {"group": 128}})
    assert type(model.model.embed_tokens) is nn.Embedding
    assert same(sparity.attach(model).state_dict(), model.state_dict())
    sizes = SIZES | {"head_dim": 16}
    scaled = Gemma2ForCausalLM(Gemma2Config(**sizes, **HEADS)).bfloat16().eval()
    with pytest.raises(InvalidInput, match="Gemma2TextScaledWordEmbedding cannot be packed"):
        sparity.attach(scaled, embeddings="int8")
    with pytest.raises(InvalidInput, match="format: packed"):
        sparity.run({"stages": [{"prune": {}}], "output": {"embeddings": "int8"}}, model=model, output=tmp_path / "x")
    convert(plain, tmp_path / "packed", embeddings="int8")
    with pytest.raises(InvalidInput, match="embeddings int8"):
        convert(tmp_path / "packed", tmp_path / "again", to="packed", embeddings="int8")


def test_a_matrix_that_is_no_list_of_rows_is_refused(plain, tmp_path):
    convert(plain, tmp_path / "packed", embeddings="int8")
    shard = tmp_path / "packed" / "sparity-00001-of-00003.safetensors"

    def as_columns(about, header, _):
        about["matrices"]["model.embed_tokens"]["format"] = "columns"

    change(shard, as_columns)
    for read in (sparity.load, AutoModelForCausalLM.from_pretrained, Decoder.open):
        with pytest.raises(CorruptFile, match="packed as columns, but an embedding or a head is stored row by row"):
            read(tmp_path / "packed")


def test_the_unpacked_weight_is_that_of_the_encoding():
    weight = torch.randn(8, 32).bfloat16()
    assert torch.equal(unpack(build_format("dense").pack(weight, "int8")), rounded(weight, "int8"))
