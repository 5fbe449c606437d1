import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparity.errors import CorruptFile, InvalidInput, NumericalError, UnsupportedModel
from sparity.models import Decoder


def test_gpt2_weights_are_shown_as_out_in(family_models):
    model = family_models["gpt2"]
    with Decoder.open(model).block(1) as block:
        by_role = {projection.role: projection for projection in block.projections}
        stored = model.transformer.h[1].attn.c_attn.weight  # [in, 3 * out]
        assert [p.role for p in block.projections] == ["q", "k", "v", "o", "fc1", "fc2"]
        assert torch.equal(by_role["k"].weight, stored.T[32:64])
        assert torch.equal(by_role["fc1"].weight, model.transformer.h[1].mlp.c_fc.weight.T)
        by_role["v"].write(torch.full((32, 32), 7.0))
        assert (block.module.attn.c_attn.weight[:, 64:] == 7).all()
        assert torch.equal(block.module.attn.c_attn.weight[:, :64], stored[:, :64])


def test_names_and_shapes_without_weights_in_memory(tiny_llama_folder):
    decoder = Decoder.open(tiny_llama_folder)
    shapes = {p.name: tuple(p.weight.shape) for site in decoder.sites(2) for p in site.projections}
    assert shapes == {
        "model.layers.2.self_attn.q_proj": (32, 32),
        "model.layers.2.self_attn.k_proj": (16, 32),
        "model.layers.2.self_attn.v_proj": (16, 32),
        "model.layers.2.self_attn.o_proj": (32, 32),
        "model.layers.2.mlp.gate_proj": (64, 32),
        "model.layers.2.mlp.up_proj": (64, 32),
        "model.layers.2.mlp.down_proj": (32, 64),
    }
    assert all(parameter.is_meta for parameter in decoder.skeleton.parameters())


def test_dtype_is_the_checkpoints_or_the_given_one(tiny_llama_folder):
    assert Decoder.open(tiny_llama_folder).dtype == torch.float32
    with Decoder.open(tiny_llama_folder, dtype="bfloat16").block(0) as block:
        assert {parameter.dtype for parameter in block.module.parameters()} == {torch.bfloat16}
    with pytest.raises(InvalidInput, match="use float32, bfloat16, float16 or auto"):
        Decoder.open(tiny_llama_folder, dtype="int8")


def test_a_checkpoint_of_the_base_model_opens_too(tiny_gpt2_folder, tmp_path):
    """GPT-2's published files name their tensors without the `transformer.` prefix."""
    tensors = load_file(tiny_gpt2_folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_gpt2_folder / "config.json").read_text())
    decoder = Decoder.open(tmp_path)
    with decoder.block(0) as block:
        assert torch.equal(block.projections[-1].weight, tensors["transformer.h.0.mlp.c_proj.weight"].T)
        assert "h.0.mlp.c_proj.weight" in decoder.export(block)


def test_an_unknown_family_shaped_like_llama_works_and_another_does_not(family_models):
    from transformers import AutoModelForCausalLM, BloomConfig, OlmoConfig

    olmo = OlmoConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    assert Decoder.open(AutoModelForCausalLM.from_config(olmo)).block_name(1) == "model.layers.1"
    bloom = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UnsupportedModel, match='"bloom" is not supported: it is neither one of gpt2, gpt_neox, llama'):
        Decoder.open(AutoModelForCausalLM.from_config(bloom))
    with pytest.raises(UnsupportedModel, match="Linear has no Hugging Face configuration"):
        Decoder.open(torch.nn.Linear(2, 2))


def test_damaged_checkpoints(tiny_llama_folder, tmp_path):
    tensors = load_file(tiny_llama_folder / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_llama_folder / "config.json").read_text())
    weights = tmp_path / "model.safetensors"

    def opened(changed):
        save_file(changed, weights)
        return Decoder.open(tmp_path)

    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CorruptFile, match=f"lacks 1 tensors of the model, {name}"):
        opened({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(CorruptFile, match=rf"{name} has shape \[2, 32\]"):
        opened({**tensors, name: torch.zeros(2, 32)})
    broken = tensors[name].clone()
    broken[0, :3] = torch.inf
    decoder = opened({**tensors, name: broken})
    with (
        pytest.raises(NumericalError, match=r"model.layers.1.mlp.up_proj: 3 of 2048 weights are NaN"),
        decoder.block(1),
    ):
        pass
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(CorruptFile, match="truncated or damaged"):
        Decoder.open(tmp_path)
    weights.unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match=r"missing shards model-00001-of-00001\.safetensors"):
        Decoder.open(tmp_path)


def test_tokens_outside_the_vocabulary(tiny_llama_folder):
    decoder = Decoder.open(tiny_llama_folder)
    with pytest.raises(InvalidInput, match="token ids run from 0 to 97, but the model's vocabulary has 97"):
        decoder.inputs(torch.tensor([[0, 97]]))
