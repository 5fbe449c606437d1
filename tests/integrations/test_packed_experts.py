"""Packed checkpoints of mixtures of experts: every expert's matrix is packed, in the file and in memory."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

import sparity
from families import build, tiny_configs
from packed_folders import logits, same, tensors
from sparity.checkpoints import packed
from sparity.checkpoints.source import CheckpointSource
from sparity.engine.modules.experts import PackedExperts
from sparity.errors import CorruptFile
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify

FAMILIES = {"mixtral": (3, "w1"), "qwen3_moe": (2, "gate_proj")}  # layers with experts, and a matrix of each


def expert_modules(model):
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def opened(folder):
    """A model that sends each token to all experts: the choice of some jumps where two are rated nearly alike."""
    return AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_used_saved_and_unpacked(plain, tmp_path, family):
    folder = plain(family)
    convert(folder, tmp_path / "packed")
    layers, role = FAMILIES[family]
    matrices = CheckpointSource(tmp_path / "packed").matrices
    assert sum(f".experts.{expert}.{role}.weight" in name for name in matrices for expert in range(4)) == 4 * layers
    assert verify(tmp_path / "packed").problems == ()

    model, dense = opened(tmp_path / "packed"), opened(folder)
    modules = expert_modules(model)
    assert len(modules) == layers
    assert {matrix.format for module in modules for _, matrix in module.matrices()} == {"bitmask"}
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    for module, original in zip(modules, (m for m in dense.modules() if type(m) is modules[0].kind), strict=True):
        assert all(torch.equal(weight, original.get_parameter(name)) for name, weight in module.dense().items())
    reference = logits(dense)
    assert float((logits(model) - reference).abs().max()) <= 0.03 * float(reference.abs().max())

    model.save_pretrained(tmp_path / "again")
    assert CheckpointSource(tmp_path / "again").matrices.keys() == matrices.keys()
    assert same(tensors(tmp_path / "again"), tensors(folder))
    again = opened(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert len(expert_modules(AutoModel.from_pretrained(tmp_path / "packed"))) == layers


def test_an_expert_that_stays_dense_beside_packed_ones(plain, tmp_path):
    folder = plain("mixtral", prune={"score": "magnitude", "dense": ["*.experts.2.*"]})
    convert(folder, tmp_path / "packed")
    source = CheckpointSource(tmp_path / "packed")
    left = {name for name in source.shapes() if ".experts." in name and name not in source.matrices}
    assert left == {name for name in source.shapes() if ".experts.2." in name}
    model = opened(tmp_path / "packed")
    formats = {name: matrix.format for name, matrix in expert_modules(model)[0].matrices()}
    assert {name for name, form in formats.items() if form == "dense"} == {n for n in formats if ".experts.2." in n}
    reference = logits(opened(folder))
    assert float((logits(model) - reference).abs().max()) <= 0.03 * float(reference.abs().max())
    model.save_pretrained(tmp_path / "again")
    assert CheckpointSource(tmp_path / "again").matrices.keys() == source.matrices.keys()
    assert same(tensors(tmp_path / "again"), tensors(folder))


def test_a_run_writes_packed_experts_and_reads_them(plain, token_files, tmp_path):
    measure = {"perplexity": [token_files["text"]], "window": 16, "speed": None}
    folder = plain("qwen3_moe", output={"format": "packed"}, measure=measure)
    assert verify(folder).problems == ()
    candidate = json.loads((folder / "sparity.json").read_text())["report"]["candidates"][0]
    assert f"{3 * 4 + 2 * 4 * 3 + 3} matrices as bitmask" in candidate["notes"][0]
    found = sparity.perplexity(sparity.load(folder), torch.arange(320) % 97, window=16)
    wanted = sparity.perplexity(convert_back(folder, tmp_path / "back"), torch.arange(320) % 97, window=16)
    assert found == pytest.approx(wanted, rel=0.02)
    recipe = {"stages": [{"prune": {"score": "magnitude", "sparsity": 0.75}}], "measure": {"speed": None}}
    again = sparity.run(recipe, model=str(folder), output=tmp_path / "again", device="cpu")
    assert again.report.candidates[0].sparsity == pytest.approx(0.75, abs=0.02)


def convert_back(folder, target):
    convert(folder, target)
    return sparity.load(target)


def wide(family, mask):
    """A model with one wide layer of two experts in bfloat16, zeros where `mask` says."""
    config = copy.deepcopy(tiny_configs()[family])
    config.hidden_size, config.intermediate_size, config.moe_intermediate_size = 256, 512, 512
    config.num_hidden_layers, config.num_local_experts, config.num_experts = 1, 2, 2
    config.head_dim, config.mlp_only_layers = 64, []
    model = build(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter[mask(parameter)] = 0
    return model


def half(weight):
    """Every second weight of a random order."""
    return torch.randperm(weight.numel()).view(weight.shape) % 2 == 0


def two_of_four(weight):
    """Two random weights of every four along a row."""
    return torch.rand(*weight.shape[:-1], weight.shape[-1] // 4, 4).argsort(-1).reshape(weight.shape) < 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mask", "values", "most"), [(half, "same", 0.58), (two_of_four, "int8", 0.34)])
def test_what_experts_take_in_file_and_memory(tmp_path, family, mask, values, most):
    model = wide(family, mask)
    dense = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    model.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "packed", values=values)
    stored = 0
    for path in (tmp_path / "packed").glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            stored += sum(shard.get_tensor(name).nbytes for name in shard.keys() if ".experts." in name)  # noqa: SIM118
    assert 0.25 * dense < stored <= most * dense
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert sum(module.nbytes for module in expert_modules(loaded)) == stored
    attached = sparity.attach(model, values=values)
    assert sum(module.nbytes for module in expert_modules(attached)) == stored
    assert not [name for name, _ in attached.named_parameters() if ".experts." in name]


@pytest.mark.parametrize("damage", ["missing", "transposed", "shape"])
def test_experts_that_do_not_fit_the_model_are_refused(plain, tmp_path, damage):
    convert(plain("mixtral"), tmp_path / "packed")
    name, folder = "model.layers.1.block_sparse_moe.experts.3.w2", tmp_path / "packed"
    shard = folder / packed.packed_shard(3, 4)
    found = {matrix.name: matrix.packed() for matrix in packed.matrices(shard).values()}
    others = {n: t for n, t in tensors(folder).items() if n.startswith("model.layers.1.")}
    others = {n: t for n, t in others.items() if n.removesuffix(".weight") not in found}
    if damage == "missing":
        del found[name]
    elif damage == "shape":
        found[name] = found[name.replace("w2", "w1")]
    packed.write_shard(shard, found, others, [name] if damage == "transposed" else [])
    packed.write_packed_index(folder, sorted(folder.glob("*.safetensors")))
    words = {"missing": "w2 is missing, while other experts", "shape": r"w2 is \[64, 32\], not \[32, 64\]"}
    with pytest.raises(CorruptFile, match=words.get(damage, r"w2 is \[64, 32\], not \[32, 64\]")):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_dense_mixture_stays_as_it_is(family_models, tmp_path):
    family_models["qwen3_moe"].save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not expert_modules(model)
    assert torch.equal(logits(model), logits(family_models["qwen3_moe"]))
    assert "quantization_config" in json.loads((tmp_path / "packed" / "config.json").read_text())
