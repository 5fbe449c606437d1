"""A rule by which channels are skipped as the tensors of a file, and back, checked."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparity.engine.kernels.skip.reference import SkipRule
from sparity.errors import CorruptFile

AGAIN = "the data belongs to another model or to other options: fetch or make the folder again"
NAMES = frozenset({"threshold", "centre", "rms", "kept", "deviations"})


def tensors_of(rule: SkipRule) -> dict[str, Tensor]:
    """`threshold` float32 `[]` or `[in]`; `centre` `[in]` where there is one; what the scale needs, as one number."""
    found = {"threshold": rule.threshold.float()}
    if rule.centre is not None:
        found["centre"] = rule.centre.float()
    if rule.scale == "rms":
        found["rms"] = torch.ones((), dtype=torch.uint8)
    elif rule.scale == "top":
        found["kept"] = torch.tensor(rule.kept)
    elif rule.scale == "statistical":
        found["deviations"] = torch.tensor(rule.deviations, dtype=torch.float64)
    return found


def rule_bytes(rule: SkipRule) -> int:
    """The bytes of a rule's tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(rule).values())


def rule_of(tensors: Mapping[str, Tensor], columns: int, what: str) -> SkipRule:
    """The rule for inputs of `columns` channels.

    Raises:
        CorruptFile: a tensor is missing, unknown, of another shape or type, or not the number that it should be.
    """
    for words, names in (("lacks", {"threshold"} - tensors.keys()), ("has the unknown", tensors.keys() - NAMES)):
        if names:
            raise CorruptFile(f"activations: {what} {words} {min(names)}; {AGAIN}")
    threshold = _checked(f"{what}.threshold", tensors["threshold"], torch.float32, ((), (columns,)))
    if bool(threshold.isnan().any()) or bool((threshold < 0).any()):
        number = float(threshold.flatten()[(~(threshold >= 0)).flatten().nonzero()[0]])
        raise CorruptFile(f"activations: {what}.threshold holds {number}, which is no threshold; {AGAIN}")
    centre = tensors.get("centre")
    if centre is not None:
        _checked(f"{what}.centre", centre, torch.float32, ((columns,),))
        if not bool(centre.isfinite().all()):
            raise CorruptFile(f"activations: {what}.centre is not finite; {AGAIN}")
    scales = [name for name in ("rms", "kept", "deviations") if name in tensors]
    if len(scales) > 1:
        raise CorruptFile(f"activations: {what} has both {' and '.join(scales)}; {AGAIN}")
    if "kept" in tensors:
        kept = int(_checked(f"{what}.kept", tensors["kept"], torch.int64, ((),)))
        if not 1 <= kept <= columns:
            raise CorruptFile(f"activations: {what}.kept is {kept}, not 1 to {columns} channels; {AGAIN}")
        return SkipRule(threshold, centre, "top", kept=kept)
    if "deviations" in tensors:
        deviations = float(_checked(f"{what}.deviations", tensors["deviations"], torch.float64, ((),)))
        if not torch.tensor(deviations).isfinite():
            raise CorruptFile(f"activations: {what}.deviations is {deviations}; {AGAIN}")
        return SkipRule(threshold, centre, "statistical", deviations=deviations)
    if "rms" in tensors:
        _checked(f"{what}.rms", tensors["rms"], torch.uint8, ((),))
        return SkipRule(threshold, centre, "rms")
    return SkipRule(threshold, centre)


def _checked(what: str, tensor: Tensor, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
        kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise CorruptFile(f"activations: {what} is {kind}, not {str(dtype).removeprefix('torch.')} {wanted}; {AGAIN}")
    return tensor
