"""What is cut together, judged by stock transformers: a cut model equals the dense one with the same units zeroed."""

import json

import pytest
import torch
from cut_models import CONFIGS, DERIVED_HEAD_WIDTH, HEADS, choice, kinds, sizes, zeroed
from safetensors.torch import save_file

from families import build
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cutting import cut_block
from sparity.models.dimensions import Cut, Dimension, cut_matrix, cuts_of
from sparity.models.transformers import resized_config

TOKENS = torch.arange(3, 51).reshape(2, 24)


def cut_folder(decoder, kept, folder):
    """The cut model as a folder that stock transformers reads."""
    tensors = dict(decoder.rest())
    for index, indices in enumerate(kept):
        with decoder.block(index) as block:
            cut = cut_block(block, indices, decoder.family, decoder.config)
            exported = decoder.export(cut)
            assert exported.keys() == decoder.stored_names(index)
            tensors.update(exported)
    changes = decoder.family.resize(decoder.config, sizes(kept))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    decoder.config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **changes}))
    return changes


def stock(folder):
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values())
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cut_model_equals_the_dense_one_with_the_same_units_zeroed(name, tmp_path):
    model = build(CONFIGS[name])
    model.save_pretrained(tmp_path / "dense")
    decoder = Decoder.open(tmp_path / "dense")
    offered = kinds(decoder)
    assert len(offered) == 2
    for kind in offered:
        kept = choice(decoder, kind)
        if kind in HEADS and name in DERIVED_HEAD_WIDTH:
            with pytest.raises(InvalidInput, match=rf'block 0, {kind}: .* type "{name}" cannot say how wide a head is'):
                decoder.family.resize(decoder.config, sizes(kept))
            assert "cut mlp_channels instead" in decoder.family.declines(decoder.config, kind)
            with decoder.block(0) as block, pytest.raises(InvalidInput, match="cannot say how wide a head is"):
                cut_block(block, kept[0], decoder.family, decoder.config)
            continue
        assert decoder.family.declines(decoder.config, kind) is None
        folder = tmp_path / kind
        folder.mkdir()
        changes = cut_folder(decoder, kept, folder)
        small = stock(folder)
        for attribute, value in changes.items():
            assert getattr(small.config, attribute) == value
        with torch.no_grad():
            logits = small(TOKENS).logits
            expected = zeroed(model, decoder, kept)(TOKENS).logits
            assert (model(TOKENS).logits - expected).abs().max() > 1e-2  # the units that go do something
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cut_block_runs_in_memory_and_knows_its_new_sizes(name):
    model = build(CONFIGS[name])
    decoder = Decoder.open(model)
    for kind in kinds(decoder):
        if kind in HEADS and name in DERIVED_HEAD_WIDTH:
            continue
        kept = choice(decoder, kind)
        with torch.no_grad():
            inputs = decoder.inputs(TOKENS, batch=2)
            zeros = Decoder.open(zeroed(model, decoder, kept))
            for index in range(len(decoder)):
                before = decoder.dimensions(index)
                with decoder.block(index) as block, zeros.block(index) as dense:
                    cut = cut_block(block, kept[index], decoder.family, decoder.config)
                    assert cut.module is block.module
                    torch.testing.assert_close(
                        cut.output(inputs, inputs.hidden), dense.output(inputs, inputs.hidden), atol=1e-5, rtol=1e-5
                    )
                    changes = decoder.family.resize_block(decoder.config, index, sizes(kept)[index])
                    small = resized_config(decoder.config, changes)
                    after = decoder.family.dimensions(cut.module, cut.name, small)
                    new = {d.name: d.size for d in before} | sizes(kept)[index]
                    assert {d.name: d.size for d in after} == new
                    originals = {p.name: p.weight for p in dense.projections}
                    for projection in cut.projections:
                        rows, columns = projection.weight.shape
                        if projection.rows is None:
                            out, into = ("nf", "nx") if projection.transposed else ("out_features", "in_features")
                            assert getattr(projection.module, out) == rows
                            assert getattr(projection.module, into) == columns
                        cuts = cuts_of(before, projection.name)
                        follows = cut_matrix(originals[projection.name], cuts, kept[index])
                        assert torch.equal(follows, projection.weight)


def test_dimensions_of_a_fused_head_and_of_dense_blocks_between_experts():
    neox = Decoder.open(build(CONFIGS["gpt_neox"])).dimensions(0)[1]
    place = "gpt_neox.layers.0.attention"
    cuts = (Cut(f"{place}.query_key_value", "rows", 24), Cut(f"{place}.dense", "columns", 8))
    assert neox == Dimension("query_heads", 4, cuts)
    decoder = Decoder.open(build(CONFIGS["qwen3_moe"]))
    names = [[(d.name, d.size) for d in decoder.dimensions(index)] for index in range(3)]
    experts = [(f"mlp_channels.{expert}", 16) for expert in range(4)]
    assert names == [
        [*experts, ("kv_groups", 2)],
        [("mlp_channels", 64), ("kv_groups", 2)],
        [*experts, ("kv_groups", 2)],
    ]
    halves = {f"mlp_channels.{expert}": 8 for expert in range(4)}
    resize = decoder.family.resize
    assert resize(decoder.config, [halves, {}, halves]) == {"moe_intermediate_size": 8}
    assert resize(decoder.config, [{}, {"mlp_channels": 32}, {}]) == {"intermediate_size": 32}
    with pytest.raises(
        InvalidInput, match=r'moe_intermediate_size would be 8 in blocks 0; 16 in blocks 2, but .*"qwen3'
    ):
        resize(decoder.config, [halves, {}, {}])
    with pytest.raises(
        InvalidInput, match=r'block 1 has no dimension "mlp_channels\.0"; it has mlp_channels, kv_groups'
    ):
        resize(decoder.config, [halves, halves, halves])


def test_a_norm_over_all_heads_or_channels_keeps_them_together():
    from transformers import Olmo2Config

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    olmo = Decoder.open(build(Olmo2Config(**sizes, num_attention_heads=4, pad_token_id=0)))
    assert [dimension.name for dimension in olmo.dimensions(0)] == ["mlp_channels"]  # q_norm is over all query heads
    llama = Decoder.open(build(CONFIGS["llama"]))
    llama.skeleton.model.layers[0].mlp.norm = torch.nn.RMSNorm(64, device="meta")
    assert [dimension.name for dimension in llama.dimensions(0)] == ["kv_groups"]
