"""sageLLM's module specification 3.2, "sparsity optimisation", carried out by Sparity: `docs/integrations/sagellm.md`.

Importing this also makes the specification's own module names importable where nothing else has them.
"""

from sparity.integrations.sagellm.exchange import from_sparse_config, to_sparse_config
from sparity.integrations.sagellm.loaded import SparseModel
from sparity.integrations.sagellm.manager import SparsityManager
from sparity.integrations.sagellm.namespace import provide
from sparity.integrations.sagellm.performance import benchmark_sparsity, load_model, measure_performance
from sparity.integrations.sagellm.protocol import (
    PruningMethod,
    SparsityConfig,
    SparsityFormat,
    SparsityPattern,
    SparsityProtocol,
)
from sparity.integrations.sagellm.quantization import QuantConfig, QuantizationManager, joint_sparse_quant
from sparity.integrations.sagellm.scheduling import IRNode, config_of, kernel_of
from sparity.integrations.sagellm.selector import DeviceInfo, check_nm_hardware_support, select_sparse_kernel
from sparity.integrations.sagellm.tensors import (
    DejaVuSparse,
    SparseGPT,
    apply_nm_sparsity,
    magnitude_prune,
    to_bsr,
    to_coo,
    to_csr,
    wanda_prune,
)

__all__ = [
    "DejaVuSparse",
    "DeviceInfo",
    "IRNode",
    "PruningMethod",
    "QuantConfig",
    "QuantizationManager",
    "SparseGPT",
    "SparseModel",
    "SparsityConfig",
    "SparsityFormat",
    "SparsityManager",
    "SparsityPattern",
    "SparsityProtocol",
    "apply_nm_sparsity",
    "benchmark_sparsity",
    "check_nm_hardware_support",
    "config_of",
    "from_sparse_config",
    "joint_sparse_quant",
    "kernel_of",
    "load_model",
    "magnitude_prune",
    "measure_performance",
    "select_sparse_kernel",
    "to_bsr",
    "to_coo",
    "to_csr",
    "to_sparse_config",
    "wanda_prune",
]

provide()
