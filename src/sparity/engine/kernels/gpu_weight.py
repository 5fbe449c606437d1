"""A packed matrix on a GPU, with the kernels that suit its format."""

import torch

from sparity.engine.kernels import gpu, triton_weight, vendor_weight
from sparity.engine.kernels.triton_weight import TritonWeight
from sparity.engine.kernels.vendor_weight import VendorWeight
from sparity.errors import InvalidInput
from sparity.formats import Packed
from sparity.formats.conversions.between import convert

GpuWeight = TritonWeight | VendorWeight
COMMON = "bitmask"  # what formats without a kernel become: it holds any mask


def declines(packed: Packed, device: torch.device | str = "cuda") -> str | None:
    """Why no GPU kernel takes this matrix on `device`, or None when one does."""
    if packed.format == "dense":
        return "no kernel for the format dense: PyTorch's own product is the one for it"
    if vendor_weight.declines(packed, device) is None:
        return None
    if packed.pair in triton_weight.TAKES:
        return triton_weight.declines(packed, device)
    if (COMMON, packed.encoding.name) not in triton_weight.TAKES:
        return f"no kernel for {packed.words}"
    return gpu.unavailable(torch.device(device))


def prepare_on_gpu(packed: Packed, device: torch.device | str = "cuda") -> GpuWeight:
    """Move a packed matrix to `device`, ready to be called with inputs `[tokens, columns]`.

    2:4 goes to the sparse tensor cores where they take it; a format without a kernel of its own becomes `COMMON`.

    Raises:
        InvalidInput: no kernel takes it, see `declines`.
        CorruptFile: it contradicts itself.
    """
    if reason := declines(packed, device):
        raise InvalidInput(f"{packed.format} {packed.shape[0]} x {packed.shape[1]}: {reason}")
    if vendor_weight.declines(packed, device) is None:
        return VendorWeight(packed, device)
    return TritonWeight(packed if packed.pair in triton_weight.TAKES else convert(packed, COMMON), device)
