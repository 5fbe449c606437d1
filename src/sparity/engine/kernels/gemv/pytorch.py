"""GEMV in PyTorch: any format, type and number of inputs; unpacks the weight for each call, so it is slow."""

from torch import Tensor

from sparity.engine.kernels.gemv.reference import quantize_tokens
from sparity.formats import Packed, format_of
from sparity.products.panels import linear


def gemv(packed: Packed, x: Tensor) -> Tensor:
    """`x` [tokens, columns] in the weight's type -> `[tokens, rows]`; int8 weights as in `reference.gemv_int8`,
    others as what they unpack to.

    Raises:
        CorruptFile: the packed matrix contradicts itself.
    """
    form = format_of(packed)
    if not packed.encoding.integer_products:
        return linear(x, form.unpack(packed))
    form.check(packed)
    quantized, token_scales = quantize_tokens(x)
    # exact: a product is at most 127 * 127, and float64 holds whole numbers up to 2^53
    sums = quantized.double() @ form.decode(packed).double().T
    return (sums * (token_scales.double()[:, None] * packed.tensors["scales"].double())).to(x.dtype)
