"""What comes from sageLLM's other parts: the request's dictionary, nodes of the scheduler's IR, the accelerator."""

import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparity
from sparity.engine.kernels import native
from sparity.engine.modules.linear import PackedLinear
from sparity.errors import InvalidInput
from sparity.integrations import sagellm
from sparity.integrations.sagellm import SparsityConfig
from sparity.integrations.sagellm_accelerator import SparsityAccelerator

CONFIGS = (
    SparsityConfig(),
    SparsityConfig(n=1),
    SparsityConfig("unstructured", 0.7, pruning_method="wanda", calibration_dataset="c4", format="coo"),
    SparsityConfig("block", 0.6, block_size=16, target_layers=["mlp"], exclude_layers=["layers.0"]),
    SparsityConfig(fuse_with_quant=True, quant_dtype="int4", enable_dynamic=True, dynamic_threshold=0.2),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_survives_the_dictionary(config):
    content = sagellm.to_sparse_config(config)
    found = sagellm.from_sparse_config(content)
    assert sagellm.to_sparse_config(found) == content
    assert found == config or (config.pattern == "n:m" and found.sparsity_ratio == 1 - config.n / config.m)


def test_the_dictionary_by_hand():
    assert sagellm.to_sparse_config(SparsityConfig(n=1)) == {
        "enabled": True,
        "pattern": "semi_structured",
        "sparse_format": "n_m",
        "sparsity_ratio": 0.75,
        "n": 1,
        "m": 4,
        "block_size": 32,
        "metadata": {},
    }
    found = sagellm.from_sparse_config(
        {"pattern": "block", "block_size": 8, "sparsity_ratio": 0.5, "metadata": {"x": 1}}
    )
    assert found == SparsityConfig("block", block_size=8)
    assert sagellm.from_sparse_config({"enabled": False, "pattern": "structured"}) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"patern": "block"}, 'did you mean "pattern"'),
        ({"pattern": "structured"}, "stages `channels` and `structure`"),
        ({"pattern": "unstructured", "sparse_format": "csc"}, "format: expected one of"),
        ({"pattern": "unstructured", "sparse_format": "n_m"}, "holds semi_structured weights only"),
        ({"pattern": "semi_structured", "sparsity_ratio": 0.9}, "contradicts 2:4"),
        ({"metadata": {"sparity": {"bakend": "cuda"}}}, 'did you mean "backend"'),
    ],
)
def test_what_a_dictionary_cannot_say_is_refused(content, words):
    with pytest.raises(InvalidInput, match=words):
        sagellm.from_sparse_config(content)


def test_dynamic_sparsity_is_not_in_the_dictionary():
    with pytest.raises(InvalidInput, match="leaves the weights alone"):
        sagellm.to_sparse_config(SparsityConfig("dynamic"))


def test_a_node_without_sparsity_is_dense():
    node = sagellm.IRNode("prefill")
    assert sagellm.config_of(node) is None
    assert sagellm.kernel_of(node) == "dense_fallback_kernel"
    with pytest.raises(InvalidInput, match='needs "sparsity"'):
        sagellm.kernel_of(sagellm.IRNode("decode", {"use_sparse_kernel": True}))
    with pytest.raises(InvalidInput, match='did you mean "pattern"'):
        sagellm.config_of(sagellm.IRNode("decode", {"sparsity": {"patern": "n:m"}}))


def test_the_entry_point_is_the_accelerator():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["sagellm.accelerators"]["sparity"].partition(":")
    assert getattr(import_module(module), name) is SparsityAccelerator
    assert SparsityAccelerator.meta()["version"] == sparity.__version__
    assert SparsityAccelerator.is_available() is (native.unavailable() is None)
    backends = ["cpu", "CPU", "cuda", SimpleNamespace(name="cpu"), SimpleNamespace(name="ascend")]
    assert [SparsityAccelerator.is_compatible_with_backend(each) for each in backends] == [
        True,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_accelerator_puts_the_engines_model_on_the_kernels(wrapped, tiny_llama_folder):
    model = sparity.load(tiny_llama_folder, dtype="bfloat16")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data = sparity.prune_weight(
            layer.mlp.up_proj.weight.data, score="magnitude", pattern="2:4"
        )[0]
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    engine = SimpleNamespace(model=model) if wrapped else model
    assert SparsityAccelerator.apply(engine) is engine
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0.05, atol=0.05)
    with pytest.raises(InvalidInput, match="holds none as `model`"):
        SparsityAccelerator.apply(SimpleNamespace(runner=model))
