"""A predictor of the neurons or heads that will be active: two matrices without biases, trained as DejaVu's."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from sparity.dynamic.activations.method_data import checked, whole_number
from sparity.dynamic.activations.rule_data import AGAIN
from sparity.errors import CorruptFile

TINIEST = torch.finfo(torch.float32).tiny
AHEAD = "ahead"  # the tensor that says that the predictor reads what the block before reads
HELD_OUT = 20  # every so many tokens one is for measuring
FLOOR = 0.005  # added to the share of active neurons, the weight of the others
DECAY = 0.01
EVERY, PATIENCE, ENOUGH = 10, 5, 0.99  # steps between measurements, without a gain before it stops, recall


@dataclass(frozen=True)
class Trained:
    """`first` [rank, in], `second` [neurons, rank], and the share of held-out active neurons that they find."""

    first: Tensor
    second: Tensor
    recall: float


def top(logits: Tensor, kept: int) -> Tensor:
    """`logits` [..., neurons] -> bool, True for the `kept` largest, of equal ones the first; NaN counts too."""
    order = logits.nan_to_num(torch.inf, torch.inf, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    largest = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :kept], True)
    return largest | logits.isnan()


def active(neurons: Tensor, kept: int) -> tuple[Tensor, bool]:
    """`neurons` [tokens, neurons] -> bool, those that count, and whether they are those of a ReLU: above 0.

    Where some are below 0, each token's `kept` largest magnitudes count.
    """
    if bool((neurons < 0).any()):
        return top(neurons.abs(), kept), False
    return neurons > 0, True


def trained(x: Tensor, labels: Tensor, kept: int, rank: int, steps: int, rate: float) -> Trained:
    """Train a predictor; the same data gives the same bits, in any unit of `x`.

    Binary cross-entropy with the weight `y (1 - w) + w`, w the share of active neurons, by AdamW on all tokens at once
    from seeded random matrices. What found the most of the held-out tokens' active neurons is returned.

    Args:
        x: `[tokens, in]`, float32.
        labels: bool `[tokens, neurons]`.
        kept: the neurons of a token that the predictor may name.
        rank: its inner width.
        steps: at most.
        rate: AdamW's learning rate.
    """
    held = torch.arange(len(x), device=x.device) % HELD_OUT == 0
    learned = ~held if len(x) > 1 else held
    with torch.inference_mode(False), torch.enable_grad():
        scaled = (x / x.square().mean().sqrt().clamp_min(TINIEST)).clone()
        targets = labels[learned].float()
        weight = targets.mean() + FLOOR
        weights = targets * (1 - weight) + weight
        generator = torch.Generator().manual_seed(0)
        shapes = ((rank, x.shape[1]), (labels.shape[1], rank))
        drawn = [(torch.rand(shape, generator=generator) * 2 - 1) * shape[1] ** -0.5 for shape in shapes]
        first, second = (matrix.to(x.device).requires_grad_() for matrix in drawn)
        optimiser = torch.optim.AdamW([first, second], rate, weight_decay=DECAY)
        best, since = _measured(first, second, scaled[held], labels[held], kept), 0
        for step in range(1, steps + 1):
            optimiser.zero_grad()
            logits = scaled[learned] @ first.T @ second.T
            binary_cross_entropy_with_logits(logits, targets, weight=weights).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if step % EVERY and step != steps:
                continue
            now = _measured(first, second, scaled[held], labels[held], kept)
            best, since = (now, 0) if now.recall > best.recall else (best, since + 1)
            if since == PATIENCE or best.recall > ENOUGH:
                break
    return best


def _measured(first: Tensor, second: Tensor, x: Tensor, labels: Tensor, kept: int) -> Trained:
    with torch.no_grad():
        named = top(x @ first.T @ second.T, kept)
        found = float((named & labels).sum()) / max(float(labels.sum()), 1.0)
        return Trained(first.detach().clone(), second.detach().clone(), found)


@dataclass
class Predictor:
    """`first` [rank, in] and `second` [neurons, rank] give each neuron its logit."""

    first: Tensor
    second: Tensor
    kept: int

    def keep(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> bool [..., neurons]."""
        self.first, self.second = self.first.to(x.device), self.second.to(x.device)
        return top(x.float() @ self.first.T @ self.second.T, self.kept)


def predictor_of(tensors: Mapping[str, Tensor], columns: int, neurons: int | None, what: str) -> Predictor:
    """The data of a predictor, checked.

    Raises:
        CorruptFile: it does not fit.
    """
    matrix, number = torch.float32, torch.float32
    layout = {"first": (matrix, (None, columns)), "second": (matrix, (neurons, None)), "recall": (number, ())}
    ahead = {AHEAD: (torch.uint8, ())} if AHEAD in tensors else {}
    checked(tensors, {**layout, "kept": (torch.int64, ()), **ahead}, what)
    first, second = tensors["first"], tensors["second"]
    if len(first) != second.shape[1]:
        raise CorruptFile(f"activations: {what}: matrices of ranks {len(first)} and {second.shape[1]}; {AGAIN}")
    return Predictor(first, second, whole_number(tensors, "kept", 1, len(second), what))
