"""vLLM's way through the plug-in, with stand-ins of its interfaces: config, layers, loading by name, products."""

import pickle
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

import sparity
from packed_folders import tensors
from sparity.checkpoints.packed import quantization_config
from sparity.errors import CorruptFile, InvalidInput
from sparity.integrations.vllm import operators, register, stored

PACKED = quantization_config("packed")
BLOCK, OTHER = "model.layers.0", "model.layers.1"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture
def folder(plain):
    """A packed tiny Llama, 2:4, q of its second block and down of its first dense."""
    dense = ["*.1.self_attn.q_proj", "*.0.mlp.down_proj"]
    prune = {"score": "magnitude", "solver": "mask_only", "pattern": "2:4", "dense": dense}
    return plain(prune=prune, output={"format": "packed"})


@pytest.fixture
def config(vllm, folder):
    """The plug-in's configuration of that folder, as vLLM makes it."""
    register()
    found = vllm["sparity"].from_config(PACKED)
    found.maybe_update_config(str(folder), hf_config=None, revision=None)
    found.packed_modules_mapping = {name: list(parts) for name, parts in FUSED.items()}
    return found


def layer_of(config, prefix, parts):
    """A layer of vLLM's with all tensors of the files handed over by name, then finished."""
    dense = tensors(config.folder)
    owner = prefix.rpartition(".")[0]
    weights = [dense[f"{owner}.{part}.weight"] for part in parts]
    base = import_module("vllm.model_executor.layers.linear").LinearBase
    layer = base(config, prefix, weights[0].shape[1], [len(weight) for weight in weights])
    for path in sorted(config.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                inside, _, part = name.rpartition(".")
                if inside in {f"{owner}.{each}" for each in parts}:
                    parameter = layer.get_parameter(part)
                    parameter.weight_loader(parameter, shard.get_tensor(name), parts.index(inside.rpartition(".")[2]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer, torch.cat(weights)


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [
        (f"{BLOCK}.self_attn.qkv_proj", FUSED["qkv_proj"]),
        (f"{OTHER}.self_attn.qkv_proj", FUSED["qkv_proj"]),  # its q is dense
        (f"{BLOCK}.mlp.gate_up_proj", FUSED["gate_up_proj"]),
        (f"{BLOCK}.self_attn.o_proj", ("o_proj",)),
    ],
)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_layer_gives_the_product_of_the_weights_that_it_fuses(config, prefix, parts, tokens):
    layer, weight = layer_of(config, prefix, parts)
    assert not list(layer.parameters())
    x, bias = torch.randn(tokens, weight.shape[1]).bfloat16(), torch.randn(len(weight)).bfloat16()
    for shift in (None, bias):
        found, wanted = layer(x, shift), functional.linear(x.float(), weight.float())
        wanted = wanted if shift is None else wanted + shift.float()
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


def test_the_products_are_those_of_the_model_in_transformers_bit_for_bit(config):
    model = sparity.load(config.folder)
    x = torch.randn(2, model.config.hidden_size).bfloat16()
    attention = model.model.layers[0].self_attn
    own = torch.cat([projection(x) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
    assert torch.equal(layer_of(config, f"{BLOCK}.self_attn.qkv_proj", FUSED["qkv_proj"])[0](x), own)


def test_layers_that_are_not_packed_are_vllms_own(config):
    linear = import_module("vllm.model_executor.layers.linear")
    assert (
        type(linear.LinearBase(config, f"{BLOCK}.mlp.down_proj", 8, [8]).quant_method) is linear.UnquantizedLinearMethod
    )
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None


def test_placeholders_have_the_types_of_the_tensors(config):
    base = import_module("vllm.model_executor.layers.linear").LinearBase
    weight = tensors(config.folder)[f"{BLOCK}.self_attn.o_proj.weight"]
    layer = base(config, f"{BLOCK}.self_attn.o_proj", weight.shape[1], [len(weight)])
    types = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert types == {"masks": torch.uint8, "offsets": torch.int64, "values": torch.bfloat16}
    assert all(not parameter.numel() for parameter in layer.parameters())  # vLLM asks for no tensor for an empty one


def test_vllm_learns_of_the_method_once_or_several_times(vllm):
    register()
    first = vllm["sparity"]
    register()
    assert vllm == {"sparity": first}
    config = first.from_config(PACKED)
    assert (config.get_name(), config.get_supported_act_dtypes()) == ("sparity", [torch.bfloat16])
    assert (config.get_min_capability(), config.get_config_filenames()) == (0, [])


def test_the_configuration_goes_to_other_processes(config):
    assert pickle.loads(pickle.dumps(config)).folder == config.folder


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**PACKED, "version": 3}, "version 3"),
        ({**PACKED, "runtime": [{"name": "activations", "options": {}, "file": "a", "sha256": ""}]}, "not attached in"),
    ],
)
def test_checkpoints_that_vllm_would_run_wrongly_are_refused(vllm, content, words):
    register()
    with pytest.raises(InvalidInput, match=words):
        vllm["sparity"].from_config(content)


def test_layers_that_do_not_fit_are_refused(config):
    prefix = f"{BLOCK}.self_attn.o_proj"
    rows, columns = tensors(config.folder)[f"{prefix}.weight"].shape
    base = import_module("vllm.model_executor.layers.linear").LinearBase
    with pytest.raises(CorruptFile, match="outputs, the model's"):
        base(config, prefix, columns, [rows + 1])
    with pytest.raises(CorruptFile, match="the model's has"):
        base(config, prefix, columns + 1, [rows])
    method = config.get_quant_method(base.__new__(base), prefix)
    with pytest.raises(InvalidInput, match="tensor_parallel_size=1"):
        method.create_weights(nn.Module(), columns // 2, [rows], columns, rows, torch.bfloat16)


def test_packed_experts_are_refused(vllm, plain):
    path = plain("mixtral", prune={"score": "magnitude"}, output={"format": "packed"})
    register()
    config = vllm["sparity"].from_config(PACKED)
    config.maybe_update_config(str(path))
    experts = next(name for name in stored.opened(path).matrices if ".experts." in name).partition(".experts.")[0]
    with pytest.raises(InvalidInput, match="packed experts"):
        config.get_quant_method(nn.Module(), f"{experts}.experts")


def test_the_operator_is_traced_past_and_its_name_holds_in_another_process(config):
    layer, weight = layer_of(config, f"{BLOCK}.mlp.gate_up_proj", FUSED["gate_up_proj"])
    x = torch.randn(2, weight.shape[1]).bfloat16()
    torch.library.opcheck(
        torch.ops.sparity.packed_layer,
        (x, layer.quant_method.key, len(weight)),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert layer.quant_method.key == f"{config.folder}:{BLOCK}.mlp.gate_up_proj"
    with pytest.raises(InvalidInput, match="the model must be loaded in it"):
        operators.packed_layer(x, "another", 4)


def test_the_entry_point_imports_neither_vllm_nor_torch():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["sparity"].partition(":")
    assert getattr(import_module(module), name) is register
    code = f"import sys, {module}\nassert not {{'torch', 'vllm'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
