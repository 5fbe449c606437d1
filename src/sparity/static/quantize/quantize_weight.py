"""Quantise a single matrix: fewer bits for the weights that stay, in one pure function."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparity import registry
from sparity.errors import InvalidInput, suggestion, wrong_input
from sparity.static.matrices.matrix_input import check_matrix, gathered
from sparity.static.quantize.quantizing import Quantizing


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised matrix; unpacks into `weight, codes, scales, zeros`.

    Attributes:
        weight: `[out, in]`, what the codes stand for, in the type of the weight that was given.
        codes: `[out, in]`, int16. Symmetric integers count from 0 up and down, those with a zero point from 0 up; a
            code of a codebook is the place of its entry; one of e4m3 is the eight bits as a whole number.
        scales: `[out, groups]`, float32.
        zeros: `[out, groups]`, float32: the code that stands for 0 where integers have a zero point, else 0. Integers
            are `(codes - zeros) * scales`.
        input_scales: `[in]`: what each column was multiplied with before its codes were chosen (AWQ, SmoothQuant); the
            weight is what the codes stand for divided by it. None for other methods.
        bits: `[groups]`, the bits of the codes of each group of columns.
        codebook: `[entries]`, float32, rising: the values of the whole matrix that the method codebook found; a code is
            the place of its value, and all scales are 1. None for other methods.
    """

    weight: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    input_scales: Tensor | None = field(default=None)
    bits: tuple[int, ...] = ()
    codebook: Tensor | None = field(default=None)

    def __iter__(self) -> Iterator[Tensor]:
        """The first four."""
        return iter((self.weight, self.codes, self.scales, self.zeros))


@wrong_input()
def quantize_weight(
    weight: Tensor,
    inputs: Tensor | None = None,
    *,
    method: str = "nearest",
    bits: int | None = None,
    group: int | None = None,
    symmetric: bool | None = None,
    keep: Tensor | None = None,
    grid: str | Mapping[str, Any] = "integers",
    **options: Any,
) -> QuantizedWeight:
    """Quantise one weight matrix; the arguments are not changed.

    Args:
        weight: `[out, in]`, any floating type.
        inputs: what the matrix is multiplied with, `[tokens, in]` (one sequence) or `[samples, tokens, in]`.
        method: "nearest", "gptq", "awq", "smoothquant", "slim_llm" or "codebook".
        bits: of a code, 2 to 8 for integers; None is 4, or what the grid has.
        group: how many neighbours of a row share a scale; None is a whole row. The method codebook has no scales.
        symmetric: integers around 0, or with a zero point; None is symmetric.
        keep: bool `[out, in]`, False where the result must be 0; None keeps the zeros that the weight has.
        grid: "integers", "nf4", "e4m3", or {"codebook": {"entries": [...]}}: a name, or {name: {option: value}}.
        options: options of the method, and of integers where the grid is given by its name alone.

    Returns:
        The weight as it now is, its codes, scales and zero points.

    Raises:
        InvalidInput: unknown names or options, shapes that do not fit, a group that does not divide the row.
        NumericalError: NaN or infinite numbers, scales that overflow, or a Gram matrix that cannot be factorised.

    Example:
        >>> import sparity, torch
        >>> weight = torch.tensor([[7.0, -2.4, 0.0, 3.6]])  # [out, in]
        >>> dequantised, codes, scales, zeros = sparity.quantize_weight(weight, bits=4, even=True)
        >>> codes, scales
        (tensor([[ 7, -2,  0,  4]], dtype=torch.int16), tensor([[1.]]))
        >>> dequantised
        tensor([[ 7., -2.,  0.,  4.]])
    """
    check_matrix(weight, inputs)
    if keep is not None and (not isinstance(keep, Tensor) or keep.shape != weight.shape or keep.is_floating_point()):
        raise InvalidInput(f"keep must be a mask {list(weight.shape)} of the weight's shape, True where it may stay")
    of_method, of_grid = _sorted_out(method, grid, options)
    quantizing = Quantizing.of({method: of_method}, bits, group, symmetric, of_grid)
    statistics = gathered(quantizing.needs, inputs, f"method {method}", 'method="nearest"')
    found = quantizing.apply(weight.detach(), statistics, None if keep is None else keep.bool())
    grids = found.grids if len(found.grids) > 1 else found.grids * found.scales.shape[1]
    return QuantizedWeight(
        found.weight.to(weight.dtype),
        found.codes,
        found.scales,
        found.zeros,
        found.input_scales,
        tuple(each.bits for each in grids),
        found.codebook,
    )


def _sorted_out(
    method: str, grid: str | Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], str | Mapping[str, Any]]:
    """Flat options as those of the method, and the grid with its own."""
    known = registry.option_types(registry.get("quantize.method", method))
    of_method = {key: value for key, value in options.items() if key in known}
    rest = {key: value for key, value in options.items() if key not in known}
    if not rest:
        return of_method, grid
    of_grid = registry.option_types(registry.get("quantize.grid", grid)) if isinstance(grid, str) else {}
    for key in rest:
        if key not in of_grid:
            everywhere = [*known, *of_grid]
            raise InvalidInput(
                f'no option "{key}" in method {method} or grid {grid}{suggestion(key, everywhere)} '
                f"(options: {', '.join(sorted(everywhere)) or 'none'})"
            )
    return of_method, {str(grid): rest}
