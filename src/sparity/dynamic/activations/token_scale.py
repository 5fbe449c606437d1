"""A scale of a threshold for each token: the one that a search finds best, and a linear model that predicts it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.activations.method_data import checked
from sparity.dynamic.activations.rule_data import AGAIN
from sparity.errors import CorruptFile

TINIEST = torch.finfo(torch.float32).tiny
MOST_TOKENS = 256  # that are searched, each with every scale
SCALES = 2.0 ** torch.linspace(-2, 2, 33)
HALVINGS = 40  # of the range of the error's bound
FEATURES = 4


def features(x: Tensor, unit: Tensor) -> Tensor:
    """`x` [..., in] -> [..., 4], float64: log2 of the mean, the deviation and the maximum of |x|, in units; entropy.

    The entropy is that of the shares of the channels in the sum of |x|, as a share of the largest that is possible.
    """
    size = x.float().abs().double() / unit.double()
    total = size.sum(-1, keepdim=True).clamp_min(TINIEST)
    shares = size / total
    entropy = torch.special.entr(shares).sum(-1) / torch.tensor(max(x.shape[-1], 2)).double().log()
    spread = size.std(-1, correction=0)
    known = (size.mean(-1), spread, size.amax(-1))
    return torch.stack([*(value.clamp_min(TINIEST).log2() for value in known), entropy], -1)


@dataclass
class TokenScale:
    """Channel i of a token counts where |x_i| > scale(x) threshold, or where that is NaN."""

    threshold: Tensor  # []
    base: Tensor  # [], the unit of the features
    weights: Tensor  # [5], the last one is the constant
    centre: Tensor  # [4]
    spread: Tensor  # [4]

    def scale(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> [..., 1], float32, within the range that was searched; 1 for a token that is not finite."""
        known = (features(x, self.base) - self.centre) / self.spread
        low, high = (float(SCALES[end].log2()) for end in (0, -1))
        power = known @ self.weights[:-1].double() + self.weights[-1]
        return torch.exp2(power.nan_to_num(0.0, 0.0, 0.0).clamp(low, high)).float()[..., None]

    def keep(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> bool like it."""
        self._move(x.device)
        size = x.float().abs()
        return (size > self.scale(x) * self.threshold) | size.isnan()

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., in] with 0 for what does not count."""
        return x.masked_fill(~self.keep(x), 0)

    def _move(self, device: torch.device) -> None:
        if self.threshold.device != device:
            for name, tensor in list(vars(self).items()):
                setattr(self, name, tensor.to(device))


def token_scale(tensors: Mapping[str, Tensor], columns: int, what: str) -> TokenScale:
    """The data of a predictor, checked.

    Raises:
        CorruptFile: it does not fit, or was trained on activations of another width.
    """
    number, vector = (torch.float32, ()), (torch.float32, (FEATURES,))
    layout = {
        "threshold": number,
        "base": number,
        "weights": (torch.float32, (FEATURES + 1,)),
        "centre_of_features": vector,
        "spread_of_features": vector,
        "width": (torch.int64, ()),
    }
    checked(tensors, layout, what)
    if int(tensors["width"]) != columns:
        raise CorruptFile(
            f"activations: the predictor of {what} was trained on {int(tensors['width'])} channels, not {columns}; "
            f"{AGAIN}"
        )
    for name in ("base", "spread_of_features"):
        if not bool((tensors[name] > 0).all()):
            raise CorruptFile(f"activations: {what}.{name} must be positive; {AGAIN}")
    if bool(tensors["threshold"] < 0):
        raise CorruptFile(f"activations: {what}.threshold holds {float(tensors['threshold'])}; {AGAIN}")
    fields = ("threshold", "base", "weights", "centre_of_features", "spread_of_features")
    return TokenScale(*(tensors[name] for name in fields))


def largest_scales(x: Tensor, base: Tensor, weight: Tensor | None, sparsity: float) -> tuple[Tensor, Tensor]:
    """For some of the tokens the largest scale of a threshold whose error stays within a bound; and those tokens.

    The error is the norm of what the output loses, as a share of the output's; the bound is the one with which
    `sparsity` of the channels is skipped on average.

    Args:
        x: `[tokens, in]`, float32.
        base: the threshold, `[]`.
        weight: `[out, in]`; None takes the activations themselves for the output.
        sparsity: in (0, 1).

    Returns:
        The scales `[searched]`, of `SCALES`, and the tokens `[searched, in]`.
    """
    searched = x[:: max(len(x) // MOST_TOKENS, 1)][:MOST_TOKENS]
    scales = SCALES.to(x.device)
    matrix = None if weight is None else weight.float().to(x.device).T
    whole = searched if matrix is None else searched @ matrix
    size = whole.norm(dim=-1).clamp_min(TINIEST)
    errors, shares = [], []
    for scale in scales:
        skipped = searched.abs() <= scale * base
        lost = searched.masked_fill(~skipped, 0)
        errors.append((lost if matrix is None else lost @ matrix).norm(dim=-1) / size)
        shares.append(skipped.double().mean(-1))
    error, share = torch.stack(errors), torch.stack(shares)  # [scales, searched]
    low, high = 0.0, float(error.max())
    for _ in range(HALVINGS):
        bound = (low + high) / 2
        if float(share.gather(0, _last_within(error, bound)[None]).mean()) > sparsity:
            high = bound
        else:
            low = bound
    return scales[_last_within(error, low)], searched


def _last_within(error: Tensor, bound: float) -> Tensor:
    """`error` [scales, tokens] -> the index of each token's last scale within the bound, else 0: `[tokens]`."""
    places = torch.arange(len(error), device=error.device)[:, None]
    return torch.where(error <= bound, places, 0).amax(0)
