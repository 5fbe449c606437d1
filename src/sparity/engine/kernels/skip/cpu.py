"""Inputs without the channels that do not count, by the compiled kernels; `SkipRule` says what they compute."""

import ctypes

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.errors import InvalidInput

CODES = {"constant": 0, "rms": 1, "top": 2, "statistical": 3}  # `scale` of `SparitySkip`


class NativeSkip:
    """A rule where the library reads it: `address` points to its `SparitySkip` as long as this object lives.

    Attributes:
        rule: what was given.
        columns: the channels of an input.
    """

    def __init__(self, rule: SkipRule, columns: int) -> None:
        """Copy the rule's numbers for inputs of `columns` channels in bfloat16.

        Raises:
            InvalidInput: thresholds or centre of another size, a negative threshold, or a centre of another type.
        """
        self.rule, self.columns = rule, columns
        thresholds = rule.threshold.detach().float()
        if thresholds.shape not in ((), (columns,)) or bool((thresholds < 0).any()) or bool(thresholds.isnan().any()):
            raise InvalidInput(
                f"skip: one threshold, or {columns}, none negative, are needed, not {list(thresholds.shape)}"
            )
        centre = rule.centre
        if centre is not None and (centre.shape != (columns,) or centre.dtype != torch.bfloat16):
            raise InvalidInput(
                f"skip: a centre [{columns}] in bfloat16 is needed, not {list(centre.shape)} in {centre.dtype}"
            )
        self._thresholds = thresholds.expand(columns).clone(memory_format=torch.contiguous_format)
        self._centre = None if centre is None else centre.detach().clone(memory_format=torch.contiguous_format)
        self._structure = native.Skip(
            thresholds=self._thresholds.data_ptr(),
            centre=None if self._centre is None else self._centre.data_ptr(),
            scale=CODES[rule.scale],
            kept=rule.kept,
            deviations=rule.deviations,
        )
        self.address = ctypes.addressof(self._structure)


def skip(rule: NativeSkip, x: Tensor, whole: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x` bfloat16 [tokens, columns] -> `rule.rule.apply(x)`, in `out` if there is one; it may be `x`.

    Args:
        rule: for as many columns.
        x: contiguous.
        whole: uint8 [tokens], 1 for tokens that stay as they are; None = none.
        out: like `x`.

    Raises:
        InvalidInput: shapes or types that do not fit.
    """
    out = torch.empty_like(x) if out is None else out
    for name, tensor in (("x", x), ("out", out)):
        fits = tensor.shape == (len(x), rule.columns) and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
        if not fits or tensor.device.type != "cpu":
            raise InvalidInput(
                f"skip: {name} must be contiguous [{len(x)}, {rule.columns}] in bfloat16, not "
                f"{list(tensor.shape)} in {tensor.dtype}"
            )
    if whole is not None and (whole.shape != (len(x),) or whole.dtype != torch.uint8 or not whole.is_contiguous()):
        raise InvalidInput(f"skip: `whole` must be uint8 [{len(x)}], not {list(whole.shape)} in {whole.dtype}")
    if native.library().sparity_skip(
        rule.address,
        x.data_ptr(),
        None if whole is None else whole.data_ptr(),
        len(x),
        rule.columns,
        out.data_ptr(),
        native.threads(),
    ):
        raise InvalidInput("skip: there is no memory for it")
    return out
