"""The configuration: the specification's fields; each does something or is refused; names of layers."""

import dataclasses

import pytest
import torch

from sparity.errors import InvalidInput
from sparity.integrations import sagellm
from sparity.integrations.sagellm import layers, meaning, selector
from sparity.integrations.sagellm.protocol import SparsityConfig
from sparity.models import Decoder
from sparity.recipe import Recipe

SPECIFIED = {
    "pattern": "n:m",
    "sparsity_ratio": 0.5,
    "n": 2,
    "m": 4,
    "pruning_method": "magnitude",
    "target_layers": None,
    "exclude_layers": None,
    "calibration_dataset": None,
    "use_gradient": False,
    "block_size": 32,
    "format": "csr",
    "enable_dynamic": False,
    "dynamic_threshold": 0.1,
    "fuse_with_quant": False,
    "quant_dtype": None,
    "backend": "cuda",
    "use_hardware_accel": True,
}
CHANGED = {  # of each field, other values than the default, with what they need beside them
    "pattern": [],
    "sparsity_ratio": [{"sparsity_ratio": 0.7}],
    "n": [{"n": 1}],
    "m": [{"m": 8}],
    "pruning_method": [
        {"pruning_method": method, "calibration_dataset": "c4"}
        for method in ("gradient", "hessian", "wanda", "sparsegpt")
    ],
    "target_layers": [{"target_layers": ["mlp.up_proj"]}],
    "exclude_layers": [{"exclude_layers": ["layers.1"]}],
    "calibration_dataset": [{"calibration_dataset": "c4"}],
    "use_gradient": [{"use_gradient": True, "calibration_dataset": "c4"}],
    "block_size": [{"block_size": 16}],
    "format": [{"format": form} for form in ("coo", "bsr", "dense")],
    "enable_dynamic": [{"enable_dynamic": True}],
    "dynamic_threshold": [{"dynamic_threshold": 0.2}],
    "fuse_with_quant": [{"fuse_with_quant": True, "quant_dtype": "int4"}],
    "quant_dtype": [{"quant_dtype": "fp8"}],
    "backend": [{"backend": "triton"}, {"backend": "tensorrt"}],
    "use_hardware_accel": [{"use_hardware_accel": False}],
}
SAID_ALREADY = {  # the specification's third example says these though the pattern does already
    ("dynamic", "enable_dynamic"),
    ("dynamic", "backend"),
    ("block", "format"),  # bsr is what blocks are held in by default
}


@pytest.fixture(scope="module")
def decoder(family_models):
    return Decoder.open(family_models["llama"])


def outcome(config, decoder):
    """Everything that a configuration leads to."""
    meaning.check(config)
    dynamic = meaning.is_dynamic(config)
    stages = []
    if config.pattern != "dynamic":
        left = layers.left_dense(decoder, config.target_layers, config.exclude_layers)
        stages = meaning.stages(config, left, layers.widths(decoder))
    kernels = [selector.kernel_for_backend(config, selector.DeviceInfo(capability)) for capability in (0.0, 8.0)]
    loads = config.backend != "tensorrt"
    text = config.calibration_dataset
    return stages, meaning.layout(config), kernels, loads, dynamic and config.dynamic_threshold, text


def outcome_or_refusal(config, decoder):
    try:
        return outcome(config, decoder)
    except InvalidInput as error:
        return str(error)


def test_fields_and_defaults_are_the_specifications():
    fields = {field.name: field.default for field in dataclasses.fields(SparsityConfig)}
    assert fields == SPECIFIED
    assert list(fields) == list(SPECIFIED)
    assert {name for name in vars(sagellm.SparsityProtocol) if not name.startswith("_")} == {
        "prune", "load_sparse_model", "verify_sparsity", "select_kernel", "report",
    }  # fmt: skip


@pytest.mark.parametrize("pattern", ["unstructured", "n:m", "block", "dynamic"])
@pytest.mark.parametrize("field", SPECIFIED)
def test_every_field_does_something_or_is_refused(pattern, field, decoder):
    before = outcome(SparsityConfig(pattern=pattern), decoder)
    found = [outcome_or_refusal(SparsityConfig(pattern=pattern, **changes), decoder) for changes in CHANGED[field]]
    for said, changes in zip(found, CHANGED[field], strict=True):
        if isinstance(said, str):
            assert any(name in said for name in (*changes, "TensorRT")), said
    assert (before in found) == ((pattern, field) in SAID_ALREADY)


@pytest.mark.parametrize("pattern", ["unstructured", "n:m", "block"])
@pytest.mark.parametrize("method", ["magnitude", "gradient", "hessian", "wanda"])
@pytest.mark.parametrize("gradient", [False, True])
def test_every_method_is_a_valid_recipe(pattern, method, gradient, decoder):
    text = None if (method, gradient) == ("magnitude", False) else "c4"
    config = SparsityConfig(pattern, pruning_method=method, use_gradient=gradient, calibration_dataset=text)
    meaning.check(config)
    (stage,) = Recipe.read({"stages": meaning.stages(config, [], {32})}).stages
    expected = {"magnitude": "taylor", "gradient": "gradient", "hessian": "fisher", "wanda": "gblm"}
    plain = {"magnitude": "magnitude", "gradient": "gradient", "hessian": "obs", "wanda": "wanda"}
    assert stage.pruning.score.name == (expected if gradient else plain)[method]
    words = {"unstructured": "unstructured", "n:m": "2 of 4 kept", "block": "blocks of 32 x 32"}
    assert stage.pruning.pattern.words == words[pattern]
    assert stage.pruning.sparsity == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "nm"}, "pattern: expected one of"),
        ({"pruning_method": "wand"}, 'did you mean "wanda"'),
        ({"n": 0}, "n: expected a whole number"),
        ({"n": True}, "n: expected a whole number"),
        ({"sparsity_ratio": float("nan")}, "sparsity_ratio: expected a number"),
        ({"use_gradient": 1}, "use_gradient: expected True or False"),
        ({"target_layers": "mlp"}, "target_layers: expected a list"),
        ({"calibration_dataset": ""}, "calibration_dataset: expected a text"),
        ({"n": 4}, "n must be less than m"),
        ({"sparsity_ratio": 0.6}, "contradicts 2:4, which removes 0.5"),
        ({"pattern": "unstructured", "sparsity_ratio": 1.0}, "must be less than 1"),
        ({"pattern": "unstructured", "block_size": 8}, "block_size = 8 does nothing"),
        ({"pattern": "unstructured", "n": 1}, "n = 1 does nothing"),
        ({"pattern": "block", "format": "coo"}, 'does not hold pattern "block"'),
        ({"pattern": "dynamic", "sparsity_ratio": 0.3}, "sparsity_ratio = 0.3 does nothing"),
        ({"pruning_method": "wanda"}, "wanda reads a text"),
        ({"calibration_dataset": "c4"}, "magnitude reads no text"),
        ({"pruning_method": "sparsegpt", "use_gradient": True}, "no place for a gradient"),
        ({"dynamic_threshold": 0.3}, "enable_dynamic"),
        ({"quant_dtype": "int4"}, "fuse_with_quant"),
        ({"fuse_with_quant": True}, "int2 to int8, or fp8, got None"),
        ({"fuse_with_quant": True, "quant_dtype": "int9"}, "got 'int9'"),
        ({"backend": "tensorrt", "enable_dynamic": True}, "dynamic sparsity is not exported"),
    ],
)
def test_what_contradicts_itself_is_refused(options, words):
    with pytest.raises(InvalidInput, match=words):
        sagellm.SparsityManager(SparsityConfig(**options))


def test_layers_are_named_by_whole_parts_of_their_names(decoder):
    names = [
        projection.name
        for index in range(len(decoder))
        for site in decoder.sites(index)
        for projection in site.projections
    ]
    left = layers.left_dense(decoder, ["self_attn.q_proj", "*.down_proj"], ["layers.1"])
    pruned = [name for name in names if name not in left]
    blocks = [index for index in range(len(decoder)) if index != 1]
    assert pruned == [f"model.layers.{i}.{name}" for i in blocks for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert layers.left_dense(decoder, None, ["embed_tokens", "lm_head"]) == []
    assert not layers.named("layers.1", "model.layers.10.mlp.up_proj")
    for options, words in [
        ((["mlp.up_prj"], None), 'target_layers: mlp.up_prj names no projection.*did you mean "up_proj"'),
        ((["lm_head"], None), "target_layers: lm_head names no projection"),
        ((None, ["attn"]), "exclude_layers: attn names no part"),
        ((["up_proj"], ["mlp"]), "nothing is left to prune"),
    ]:
        with pytest.raises(InvalidInput, match=words):
            layers.left_dense(decoder, *options)


@pytest.mark.parametrize("pattern", ["unstructured", "n:m", "block", "dynamic"])
@pytest.mark.parametrize("form", ["csr", "coo", "bsr", "dense"])
@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("capability", [0.0, 7.5, 8.0, 9.0])
def test_the_selector_is_the_specifications(pattern, form, accelerated, capability):
    config = SparsityConfig(pattern=pattern, format=form, use_hardware_accel=accelerated)
    device_info = sagellm.DeviceInfo(compute_capability=capability)
    assert sagellm.select_sparse_kernel(config, device_info) == specified(config, device_info)


def specified(config, device_info):
    """The specification's own code."""
    if config.pattern == "n:m" and device_info.compute_capability >= 8.0:
        return "cuda_sparse_nm_kernel" if config.use_hardware_accel else "triton_nm_kernel"
    elif config.pattern == "unstructured":
        if config.format == "csr":
            return "cusparse_csr_kernel"
        elif config.format == "coo":
            return "cusparse_coo_kernel"
        else:
            return "triton_sparse_kernel"
    elif config.pattern == "dynamic":
        return "triton_dynamic_sparse_kernel"
    else:
        return "dense_fallback_kernel"


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)])
def test_hardware_for_n_of_m_begins_with_ampere(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sagellm.check_nm_hardware_support(torch.device("cuda")) is has
    assert sagellm.DeviceInfo.here().compute_capability == capability[0] + capability[1] / 10
    assert not sagellm.check_nm_hardware_support(torch.device("cpu"))


def test_without_a_gpu_there_is_no_hardware_for_n_of_m(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not sagellm.check_nm_hardware_support(torch.device("cuda"))
