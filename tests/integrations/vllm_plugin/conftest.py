"""What the plug-in uses of vLLM 0.32, with the same names and signatures, where vLLM itself is not installed."""

import sys
from abc import ABC, abstractmethod
from types import ModuleType

import pytest
from torch import nn

LAYERS = "vllm.model_executor.layers"


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, *sizes, **attributes): ...

    def apply(self, layer, x, bias=None): ...


class LinearBase(nn.Module):
    """Of a layer what a method sees: it is asked for one by its prefix, then to make the weights."""

    def __init__(self, quant_config, prefix, inputs, outputs):
        super().__init__()
        self.quant_method = quant_config.get_quant_method(self, prefix)
        sizes = (inputs, outputs, inputs, sum(outputs), None)
        self.quant_method.create_weights(self, *sizes, weight_loader=None)

    def forward(self, x, bias=None):
        return self.quant_method.apply(self, x, bias)


class QuantizationConfig(ABC):
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    def maybe_update_config(self, model_name, hf_config=None, revision=None):  # noqa: B027 - as in vLLM
        pass


@pytest.fixture
def vllm(monkeypatch):
    """The stand-ins as modules; `registered` holds what plug-ins made known."""
    registered = {}

    def register_quantization_config(name):
        def wrapper(config):
            assert issubclass(config, QuantizationConfig)
            registered[name] = config
            return config

        return wrapper

    content = {
        f"{LAYERS}.linear": (LinearBase, LinearMethodBase, UnquantizedLinearMethod),
        f"{LAYERS}.quantization": (register_quantization_config,),
        f"{LAYERS}.quantization.base_config": (QuantizationConfig,),
    }
    for name in ("vllm", "vllm.model_executor", LAYERS, *content):
        module = ModuleType(name)
        for part in content.get(name, ()):
            setattr(module, part.__name__, part)
        monkeypatch.setitem(sys.modules, name, module)
    ours = "sparity.integrations.vllm.quantization"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    yield registered
    sys.modules.pop(ours, None)
