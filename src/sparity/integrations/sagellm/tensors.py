"""The specification's functions on one matrix, each by Sparity's own."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sparity.errors import InvalidInput, NumericalError, wrong_input
from sparity.formats import build_format
from sparity.static.prune.prune_weight import prune_weight


def magnitude_prune(weight: Tensor, ratio: float) -> Tensor:
    """`weight` [out, in] without the `int(ratio * size)` of least magnitude; of equal ones the first."""
    return prune_weight(weight, score="magnitude", sparsity=ratio, compare_within="layer", count="exact")[0]


def wanda_prune(weight: Tensor, activations: Tensor, ratio: float) -> Tensor:
    """The same by magnitude times the norm of the input; `activations` [tokens, in].

    Over the whole matrix, as the specification has it. The paper compares within a row, which `pruning_method="wanda"`
    and `sparity.prune_weight` do.
    """
    return prune_weight(weight, activations, score="wanda", sparsity=ratio, compare_within="layer", count="exact")[0]


def apply_nm_sparsity(weight: Tensor, n: int, m: int) -> Tensor:
    """`weight` [out, in] with the n of largest magnitude of every m neighbours of a row."""
    return prune_weight(weight, score="magnitude", pattern=f"{n}:{m}")[0]


class SparseGPT:
    """SparseGPT of one linear layer, given the Gram matrix of its inputs."""

    @wrong_input()
    def prune_layer(self, layer: nn.Linear, H: Tensor, ratio: float) -> None:  # noqa: N803 - the specification's name
        """Remove `ratio` of a layer's weights in place, and let the rest make up for it.

        Args:
            layer: weight [out, in].
            H: [in, in], the sum over tokens of x xT, or a multiple of it.
            ratio: the share to remove.

        Raises:
            InvalidInput: another shape.
            NumericalError: no Gram matrix: not symmetric, or with a clearly negative eigenvalue.
        """
        columns = layer.weight.shape[1]
        if H.shape != (columns, columns):
            raise InvalidInput(f"H must be [{columns}, {columns}] for this layer, got {list(H.shape)}")
        gram = H.double()
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        noise = columns * torch.finfo(torch.float32).eps * float(values.abs().max())
        if float((gram - gram.T).abs().max()) > noise or float(values.min()) < -noise:
            raise NumericalError("H is no Gram matrix: it must be symmetric, and no eigenvalue negative")
        inputs = (vectors * values.clamp_min(0).sqrt()).T.float()  # [in, in] with inputsT inputs = H
        pruned, _ = prune_weight(layer.weight.data, inputs, solver="sparsegpt", sparsity=ratio)
        layer.weight.data.copy_(pruned)


def to_csr(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` [out, in] -> values [kept], their columns int32 [kept], and int64 [out + 1], where each row begins."""
    part = build_format("csr").pack(weight).tensors
    return part["values"], part["columns"].int(), part["offsets"]


def to_coo(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` [out, in] -> values, rows int32 and columns int32, each [kept], row after row."""
    part = build_format("coo").pack(weight).tensors
    return part["values"], part["rows"].int(), part["columns"].int()


def to_bsr(weight: Tensor, block_size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` [out, in] -> values [blocks, side, side], their columns int32, and where each row begins.

    A block is stored when it holds a number other than 0; those at the edge are filled up with zeros.
    """
    part = build_format({"block": {"rows": block_size, "columns": block_size}}).pack(weight).tensors
    return part["values"], part["columns"].int(), part["offsets"]


class DejaVuSparse:
    """The specification's simplified DejaVu: tokens whose activations are small as a whole are not computed.

    `_predict_importance` may be overridden: a mask of tokens, or of the output's neurons. The method of the paper, with
    trained predictors, is `activations: {method: dejavu}` of a recipe.
    """

    def __init__(self, threshold: float = 0.1) -> None:
        self.threshold = threshold

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x` [tokens, in] and `weight` [out, in] -> [tokens, out], 0 where nothing was computed.

        Raises:
            InvalidInput: a mask that is as long as neither.
        """
        important = self._predict_importance(x)
        output = torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        if important.shape == x.shape[:1]:
            output[important] = linear(x[important], weight)
        elif important.shape == weight.shape[:1]:
            output[:, important] = linear(x, weight[important])
        else:
            raise InvalidInput(
                f"importance must be a mask of {x.shape[0]} tokens or {weight.shape[0]} neurons, "
                f"got {list(important.shape)}"
            )
        return output

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `forward`."""
        return self.forward(x, weight)

    def _predict_importance(self, x: Tensor) -> Tensor:
        """Bool [tokens], True where the norm passes the threshold."""
        norms: Tensor = x.norm(dim=-1)
        return norms > self.threshold
