"""int4 checkpoints: quantised models keep every bit, others are rounded, and both verify, load and convert back."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparity
from packed_folders import logits, same, tensors
from sparity.checkpoints.recorded_scales import SCALES, read_scales
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify

PRUNE = {"prune": {"score": "magnitude", "pattern": "2:4"}}
QUIET = {"dtype": "bfloat16", "measure": {"speed": None, "perplexity": []}}


@pytest.fixture(scope="module")
def small():
    """Rows of 64 and of 128 weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().eval()


def run(stages, path, *, model, **more):
    return sparity.run({**QUIET, "stages": stages, **more}, model=model, output=path, device="cpu").path


def encodings(folder):
    return {str(matrix.packed().encoding.spec) for matrix in Decoder.open(folder).source.matrices.values()}


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({"bits": 4, "group": 32}, {"group": 32, "symmetric": True, "scale_type": "float32"}),
        ({"bits": 4, "group": 64, "symmetric": False}, {"group": 64, "symmetric": False, "scale_type": "float32"}),
        (
            {"bits": 3, "group": 64, "grid": {"integers": {"scale_type": "bfloat16"}}},
            {"group": 64, "symmetric": True, "scale_type": "bfloat16"},
        ),
    ],
    ids=["symmetric", "zero points", "three bits"],
)
def test_a_quantised_model_is_packed_by_the_scales_of_its_stage(options, spec, small, tmp_path, caplog):
    plain = run([PRUNE, {"quantize": options}], tmp_path / "plain", model=small)
    with caplog.at_level(logging.WARNING):
        assert convert(plain, tmp_path / "packed", "int4") == "packed"
    assert "rounded anew" not in caplog.text
    assert encodings(tmp_path / "packed") == {str({"int4": spec})}
    assert verify(tmp_path / "packed").problems == ()
    assert same(tensors(tmp_path / "packed"), tensors(plain))
    assert convert(tmp_path / "packed", tmp_path / "again") == "plain"
    assert same(tensors(tmp_path / "again"), tensors(plain))
    dense, packed = (
        AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16") for path in (plain, tmp_path / "packed")
    )
    kl = torch.nn.functional.kl_div(
        logits(packed).float().log_softmax(-1), logits(dense).float().log_softmax(-1), log_target=True, reduction="none"
    )
    assert float(kl.sum(-1).mean()) < 1e-3  # the kernel's inputs have 8 bits


def test_a_run_packs_by_its_own_scales(small, tmp_path):
    stages = [PRUNE, {"quantize": {"bits": 4, "group": 32}}]
    plain = run(stages, tmp_path / "plain", model=small)
    packed = run(stages, tmp_path / "packed", model=small, output={"format": "packed", "values": "int4"})
    assert same(tensors(packed), tensors(plain))
    assert verify(packed).problems == ()


def test_what_is_not_on_a_grid_is_rounded_and_said(small, tmp_path, caplog):
    plain = run([{"quantize": {"bits": 8, "group": 32}}], tmp_path / "plain", model=small)
    with caplog.at_level(logging.WARNING):
        convert(plain, tmp_path / "packed", {"int4": {"group": 64}})
    assert "of the matrices are not on a grid that int4 can hold" in caplog.text
    assert encodings(tmp_path / "packed") == {str({"int4": {"group": 64, "symmetric": True, "scale_type": "bfloat16"}})}
    assert verify(tmp_path / "packed").problems == ()


def test_a_group_that_divides_no_row_is_refused_by_the_matrix_s_name(small, tmp_path):
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(InvalidInput, match=r"mlp.gate_proj.weight: int4: groups of 128 do not divide a row of 64"):
        convert(tmp_path / "small", tmp_path / "packed", {"int4": {"group": 128}})


def test_scales_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / SCALES).mkdir()
    (tmp_path / SCALES / "00-quantize.safetensors").write_bytes(b"none")
    with pytest.raises(CorruptFile, match=r"00-quantize.safetensors cannot be read"):
        read_scales(tmp_path)
    assert read_scales(tmp_path / "nowhere") == {}
