"""Which format stores a matrix in the fewest bytes."""

from torch import Tensor

from sparity import registry
from sparity.engine.kernels.native_weight import TAKES
from sparity.engine.kernels.prefill.cpu import UNPACKS
from sparity.formats import EncodingSpec, Format, build_encoding, build_format


def smallest_format(weight: Tensor, values: EncodingSpec = "same") -> Format:
    """Of the formats that can hold `weight` [rows, columns], the one that takes the fewest bytes.

    Formats compete whose products compiled kernels compute for every number of inputs, without a dense copy; where no
    kernel takes the encoding, all do.
    """
    encoding, shape = build_encoding(values), (weight.shape[0], weight.shape[1])

    def size(candidate: Format) -> tuple[int, bool]:
        bytes_taken = candidate.nbytes(shape, candidate.count(weight), weight.dtype, encoding)
        return bytes_taken, candidate.name == "dense"  # of equal ones not dense

    compiled = TAKES & (UNPACKS | {("dense", encoding.name)})
    competing = sorted((form for form, values in compiled if values == encoding.name), reverse=True)
    found = (build_format(name) for name in competing or registry.names("format"))
    return min((form for form in found if form.matches(weight) and not form.by_channel), key=size)
