"""A 2:4 matrix on a GPU's sparse tensor cores, through PyTorch's semi-structured tensors and NVIDIA's cuSPARSELt."""

import torch
from torch import Tensor

from sparity.engine.kernels import gpu
from sparity.engine.kernels.gemv.reference import quantize_tokens
from sparity.errors import InvalidInput
from sparity.formats import Packed
from sparity.formats.conversions.torch_sparse import to_semi_structured
from sparity.formats.storage.values import dtype_name

TAKES = frozenset({("two_of_four", "same"), ("two_of_four", "int8")})  # (format, encoding)
MULTIPLE = 32  # of rows and of columns, whatever the type
INT8_TOKENS = 16  # int8 products take a multiple of it


def declines(packed: Packed, device: torch.device | str = "cuda") -> str | None:
    """Why the sparse tensor cores do not take this matrix on `device`, or None when they do."""
    if packed.pair not in TAKES:
        return f"no kernel of the sparse tensor cores for {packed.words}"
    if packed.dtype == torch.float32 and not packed.quantized:
        return "sparse tensor cores take float16, bfloat16 and int8, not float32"
    if packed.shape[0] % MULTIPLE or packed.shape[1] % MULTIPLE:
        return f"sparse tensor cores take rows and columns that are multiples of {MULTIPLE}"
    if reason := gpu.no_cuda(torch.device(device)):
        return reason
    if not torch.backends.cusparselt.is_available():
        return "PyTorch was built without cuSPARSELt"
    return None


class VendorWeight:
    """One 2:4 weight that can be called with inputs.

    An input that is not finite reaches the outputs through stored values only: where dense gives 0 * inf = NaN, this
    gives what the stored values give. With int8 such a token is NaN in every row.

    Attributes:
        shape: rows (outputs) and columns (inputs).
        dtype: the type of inputs and outputs.
        device: where the weight is.
    """

    def __init__(self, packed: Packed, device: torch.device | str = "cuda") -> None:
        """Check `packed` and compress it on `device`.

        Raises:
            InvalidInput: the sparse tensor cores do not take it, see `declines`.
            CorruptFile: it contradicts itself.
        """
        if reason := declines(packed, device):
            raise InvalidInput(f"{packed.format} {packed.shape[0]} x {packed.shape[1]}: {reason}")
        self.shape, self.dtype, self.device = packed.shape, packed.dtype, torch.device(device)
        self._weight = to_semi_structured(packed, str(device))
        self._compressed: Tensor = self._weight.packed  # type: ignore[attr-defined]  # of PyTorch's subclass of Tensor
        self._scales = packed.tensors["scales"].to(self.device) if packed.quantized else None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [tokens, columns] in the weight's type, on its device -> `[tokens, rows]`.

        int8 weights meet inputs quantised per token, as in `gemv.reference.gemv_int8`.

        Raises:
            InvalidInput: shapes or types that do not fit.
        """
        if x.dim() != 2 or x.shape[1] != self.shape[1] or x.dtype != self.dtype or x.device.type != "cuda":
            raise InvalidInput(
                f"{self!r}: {dtype_name(self.dtype)} inputs [tokens, {self.shape[1]}] are needed there, not "
                f"{list(x.shape)} in {dtype_name(x.dtype)} on {x.device}"
            )
        if self._scales is None:
            return torch.nn.functional.linear(x.contiguous(), self._weight)
        tokens = len(x)
        values, token_scales = quantize_tokens(x)
        padded = torch.nn.functional.pad(values, (0, 0, 0, -tokens % INT8_TOKENS))
        # not `linear`, which would give the sums of int8 products in int8
        sums = torch._cslt_sparse_mm(self._compressed, padded.T, out_dtype=torch.int32)[:, :tokens].T
        return (sums.float() * self._scales * token_scales[:, None]).to(x.dtype)

    def __repr__(self) -> str:
        return f"VendorWeight(two_of_four, {self.shape[0]} x {self.shape[1]}, {self.device})"
