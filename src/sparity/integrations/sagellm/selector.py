"""Which kernel the specification names for a pattern on a device, and what the device can do."""

from dataclasses import dataclass

import torch

from sparity.engine.kernels.gpu import no_cuda
from sparity.integrations.sagellm.protocol import SparsityConfig

LEAST = 8  # compute capability from which tensor cores multiply 2:4
IN_TRITON = {
    "cuda_sparse_nm_kernel": "triton_nm_kernel",
    "cusparse_csr_kernel": "triton_sparse_kernel",
    "cusparse_coo_kernel": "triton_sparse_kernel",
}


@dataclass(frozen=True)
class DeviceInfo:
    """What the selector asks of a device; a processor has compute capability 0."""

    compute_capability: float = 0.0

    @classmethod
    def of(cls, device: torch.device | str) -> "DeviceInfo":
        """That of a device; 0 for all that is no CUDA GPU which PyTorch can use."""
        device = torch.device(device)
        if no_cuda(device):
            return cls()
        major, minor = torch.cuda.get_device_capability(device)
        return cls(major + minor / 10)

    @classmethod
    def here(cls) -> "DeviceInfo":
        """That of this machine's first GPU."""
        return cls.of("cuda")


def select_sparse_kernel(config: SparsityConfig, device_info: DeviceInfo) -> str:
    """The specification's own choice, case by case; `backend` is not asked."""
    if config.pattern == "n:m" and device_info.compute_capability >= LEAST:
        return "cuda_sparse_nm_kernel" if config.use_hardware_accel else "triton_nm_kernel"
    if config.pattern == "unstructured":
        vendors = f"cusparse_{config.format}_kernel"
        return vendors if vendors in IN_TRITON else "triton_sparse_kernel"
    return "triton_dynamic_sparse_kernel" if config.pattern == "dynamic" else "dense_fallback_kernel"


def kernel_for_backend(config: SparsityConfig, device_info: DeviceInfo) -> str:
    """The same, with Triton's kernel in the place of CUDA's where `backend` says so."""
    kernel = select_sparse_kernel(config, device_info)
    return IN_TRITON.get(kernel, kernel) if config.backend == "triton" else kernel


def check_nm_hardware_support(device: torch.device) -> bool:
    """Whether a device multiplies N:M weights in hardware: CUDA from compute capability 8.0 (Ampere) on.

    That hardware reads 2:4 (1:2 of 32-bit numbers), of Hopper too: 4:8 has no kernel of its own anywhere.
    """
    return DeviceInfo.of(device).compute_capability >= LEAST
