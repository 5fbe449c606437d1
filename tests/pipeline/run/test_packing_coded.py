"""`coding: huffman`: smaller files that give the same model, bit for bit, and what is said of their sizes."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparity
from packed_folders import logits, same, tensors
from sparity.checkpoints.coded_matrix import coded
from sparity.checkpoints.coded_sizes import CodedSizes, coded_sizes
from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.weight_files import weight_bytes
from sparity.engine.modules.linear import PackedLinear
from sparity.errors import InvalidInput
from sparity.formats import build_format
from sparity.integrations.vllm import stored as vllm_stored
from sparity.measure.show.sentences import describe_coding
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe

PRUNE, CODEBOOK = {"prune": {"score": "magnitude"}}, {"quantize": {"method": "codebook", "bits": 3}}
UP = "model.layers.0.mlp.up_proj"


def recipe(*stages, **output):
    return {"dtype": "bfloat16", "stages": list(stages), "measure": {"speed": None}, "output": output}


def run(model, folder, *stages, **output):
    return sparity.run(recipe(*stages, **output), model=model, output=folder, device="cpu").path


def matrices(folder):
    return CheckpointSource(folder).matrices


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_same_model_from_smaller_files_and_back(family_models, tmp_path, family):
    plain = run(family_models[family], tmp_path / "plain", PRUNE, CODEBOOK)
    convert(plain, tmp_path / "packed")
    convert(plain, tmp_path / "coded", coding="huffman")
    convert(tmp_path / "coded", tmp_path / "back")
    assert same(tensors(plain), tensors(tmp_path / "coded"))
    assert same(tensors(plain), tensors(tmp_path / "back"))
    assert weight_bytes(tmp_path / "coded") < min(weight_bytes(tmp_path / "packed"), weight_bytes(plain))
    names = matrices(tmp_path / "packed").keys()
    assert matrices(tmp_path / "coded").keys() == names
    assert any("coded" in matrix.entry for matrix in matrices(tmp_path / "coded").values())
    assert verify(tmp_path / "coded").problems == ()
    loaded, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("coded", "packed"))
    assert torch.equal(logits(loaded), logits(expected))
    assert torch.equal(logits(sparity.load(tmp_path / "coded")), logits(sparity.load(tmp_path / "packed")))
    loaded.save_pretrained(tmp_path / "saved")
    assert same(tensors(plain), tensors(tmp_path / "saved"))


def test_a_matrix_runs_in_the_format_that_its_header_names(family_models, tmp_path):
    """Half zeros: bitmask. Hardly any: dense, which without a code would stay an ordinary tensor."""
    pruned = run(family_models["llama"], tmp_path / "pruned", PRUNE, CODEBOOK, format="packed", coding="huffman")
    many = {"quantize": {"method": "codebook", "bits": 6}}
    whole = run(family_models["llama"], tmp_path / "whole", many, format="packed", coding="huffman")
    assert {matrix.entry["format"] for matrix in matrices(pruned).values()} == {"bitmask"}
    whole_of = {name: matrix.entry["format"] for name, matrix in matrices(whole).items()}
    assert "dense" in whole_of.values()
    model = sparity.load(whole)
    for name, form in whole_of.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, PackedLinear)
        assert module.packed.format == form
        assert "values" in module.packed.tensors


def test_weights_of_many_values_take_no_more(family_models, tmp_path):
    plain = run(family_models["llama"], tmp_path / "plain", PRUNE)
    for coding in ("none", "huffman"):
        convert(plain, tmp_path / coding, coding=coding)
    assert weight_bytes(tmp_path / "huffman") <= weight_bytes(tmp_path / "none")
    assert same(tensors(tmp_path / "huffman"), tensors(plain))
    assert coded_sizes(CheckpointSource(tmp_path / "none")) == CodedSizes()


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_stored_values_of_an_encoding_lie_under_a_code_too(family_models, tmp_path, values):
    plain = run(family_models["llama"], tmp_path / "plain", PRUNE)
    for coding in ("none", "huffman"):
        convert(plain, tmp_path / coding, values, embeddings="int8", coding=coding)
    assert same(tensors(tmp_path / "none"), tensors(tmp_path / "huffman"))
    assert weight_bytes(tmp_path / "huffman") < weight_bytes(tmp_path / "none")
    said = matrices(tmp_path / "huffman")
    assert {each.entry["encoding"].popitem()[0] if "encoding" in each.entry else "int8" for each in said.values()} == {
        values,
        "int8",
    }
    assert any("coded" in matrix.entry for matrix in said.values())


def test_the_sizes_are_those_of_the_files_tables_included(family_models, tmp_path):
    folder = run(family_models["llama"], tmp_path / "out", PRUNE, CODEBOOK, format="packed", coding="huffman")
    found = verify(folder)
    shards = sum(path.stat().st_size for path in folder.glob("sparity-*.safetensors"))
    assert found.bytes == weight_bytes(folder) == shards
    layouts, stored, dense = Counter(), 0, 0
    for matrix in matrices(folder).values():
        parts, said = coded(matrix.packed())
        if said:
            layouts[said["layout"]] += 1
            stored += sum(part.nbytes for part in parts.values())
            dense += matrix.weight().nbytes
    assert found.coded == CodedSizes(dict(layouts), stored, dense)
    assert stored < dense / 4
    record = json.loads((folder / "sparity.json").read_text())
    candidate = record["report"]["candidates"][0]
    assert candidate["bytes_sparse"] == shards
    assert candidate["name"].endswith(", packed, Huffman-coded")
    note = candidate["notes"][0]
    assert "matrices as bitmask, multiplied by compiled kernels" in note or "unpacked for every product" in note
    assert f"; {layouts.total()} matrices Huffman-coded" in note
    sizes = f"in {stored / 1000:.1f} kB with tables (dense {dense / 1000:.1f} kB), decoded when loaded"
    assert sizes in note
    assert describe_coding(found.coded).endswith(sizes)


def test_the_sentence_says_which_layout():
    assert describe_coding(CodedSizes()) == ""
    assert describe_coding(CodedSizes({"all": 1}, 900, 4000)) == (
        "1 matrix Huffman-coded, in 900 B with tables (dense 4.0 kB), decoded when loaded"
    )
    assert describe_coding(CodedSizes({"all": 3, "gaps": 2}, 900, 4000)).startswith(
        "5 matrices Huffman-coded, 2 of them as gaps and values, in 900 B"
    )


def test_a_code_is_for_packed_checkpoints(family_models, tmp_path):
    with pytest.raises(InvalidInput, match="`coding: huffman` needs `format: packed`"):
        Recipe.read(recipe(PRUNE, coding="huffman"))
    with pytest.raises(InvalidInput, match="none' or 'huffman'"):
        Recipe.read(recipe(PRUNE, format="packed", coding="zip"))
    plain = run(family_models["llama"], tmp_path / "plain", PRUNE, CODEBOOK)
    convert(plain, tmp_path / "packed")
    with pytest.raises(InvalidInput, match="convert it to plain first, then pack it with coding huffman"):
        convert(tmp_path / "packed", tmp_path / "again", coding="huffman")


def test_vllm_is_told_the_names_of_the_pieces(family_models, tmp_path):
    folder = run(family_models["llama"], tmp_path / "out", PRUNE, CODEBOOK, format="packed", coding="huffman")
    source = CheckpointSource(folder)
    parts = vllm_stored.parts_of(source, [UP])
    assert parts.keys() == source.matrices[f"{UP}.weight"].entry["hashes"].keys()
    assert build_format("bitmask").pack(source.read([f"{UP}.weight"])[f"{UP}.weight"]).tensors.keys() - parts.keys()
    (packed,) = vllm_stored.read(source, [UP])
    assert packed.format == "bitmask"
