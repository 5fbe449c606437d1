"""Activation sparsity without a recipe: a mask, a fit, and a model that runs sparse for a while."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparity import registry
from sparity.calibration import Statistics, walk
from sparity.calibration.evidence import LiveSequential
from sparity.dynamic.activations.fitting import skipped_share
from sparity.dynamic.activations.methods.base import Method, Seen, nothing_skipped
from sparity.dynamic.activations.stage import Activations
from sparity.errors import InvalidInput, NumericalError, wrong_input
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.stages.evidence_in_memory import EvidenceInMemory

STAGE_OPTIONS = ("prompt", "first", "heal")  # of `with_activations`; all others are the method's


@dataclass(frozen=True)
class FittedActivations:
    """What a method found.

    Attributes:
        threshold: float32, `[]` or `[in]`; what it is compared with depends on the method, see its page. None for a
            method without one.
        centre: float32 `[in]`, from which magnitudes are counted; None = 0.
        realised: the share of the samples' channels that is skipped.
        tensors: all of the method's data.
    """

    threshold: Tensor | None
    centre: Tensor | None
    realised: float
    tensors: Mapping[str, Tensor]
    method: Method

    def keep(self, x: Tensor) -> Tensor:
        """`x` [tokens, in] or [samples, tokens, in] -> bool like it, True where a channel is computed."""
        return self.method.mask(self.tensors, x if x.ndim == 3 else x[None]).view(x.shape)


@wrong_input()
def activation_mask(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    method: str,
    sparsity: float,
    partner: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Which channels of activations a method computes, fitted to these activations themselves.

    Args:
        x: `[tokens, in]` (one sequence) or `[samples, tokens, in]`.
        weight: `[out, in]`, what multiplies them; for methods that weigh channels by it.
        method: of `sparity methods activations.method`.
        sparsity: the share of channels to skip, in [0, 1).
        partner: like `x`, what the activations are multiplied with, for methods that weigh channels by it.
        options: the method's.

    Returns:
        bool like `x`, True where a channel is computed; NaN always is.

    Raises:
        InvalidInput: an unknown method or option, shapes that do not fit, a sparsity out of range.

    Example:
        >>> import sparity, torch
        >>> x = torch.tensor([[3.0, -1.0, 0.5, 2.0]])
        >>> sparity.activation_mask(x, method="teal", sparsity=0.5)
        tensor([[ True, False, False,  True]])
    """
    return fit_activations(
        x, weight, method=method, sparsity=sparsity, partner=partner, allow_nan=True, **options
    ).keep(x)


@wrong_input()
def fit_activations(
    samples: Tensor,
    weight: Tensor | None = None,
    *,
    method: str,
    sparsity: float,
    partner: Tensor | None = None,
    allow_nan: bool = False,
    **options: Any,
) -> FittedActivations:
    """Fit a method to activations.

    Args:
        samples: `[n, tokens, in]`, or `[tokens, in]` as one sequence.
        weight: and the other arguments as of `activation_mask`.
        method: of `sparity methods activations.method`.
        sparsity: the share of channels to skip, in [0, 1).
        partner: like `samples`.
        allow_nan: leave tokens that hold NaN or infinite numbers out of the fit instead of refusing them.
        options: the method's.

    Raises:
        InvalidInput: an unknown method or option, shapes that do not fit, a sparsity out of range.
        NumericalError: NaN or infinite samples.

    Example:
        >>> import sparity, torch
        >>> fitted = sparity.fit_activations(torch.tensor([[[4.0, -1.0], [2.0, 3.0]]]), method="teal", sparsity=0.5)
        >>> fitted.realised, float(fitted.threshold)
        (0.5, 2.0)
    """
    _check(samples, weight, partner, sparsity)
    built: Method = registry.build("activations.method", {method: options})
    rows = samples.detach().reshape(-1, samples.shape[-1]).float()
    beside = None if partner is None else partner.detach().reshape(-1, samples.shape[-1]).float()
    if allow_nan:
        finite = rows.isfinite().all(-1)
        finite = finite if beside is None else finite & beside.isfinite().all(-1)
        finite = finite if bool(finite.any()) else ~finite
        rows, beside = rows[finite].nan_to_num(0, 0, 0), None if beside is None else beside[finite]
    statistics = Statistics.gather("samples", built.statistics)
    statistics.add(rows, len(samples) if samples.ndim == 3 else 1)
    seen = Seen(statistics, weight, beside, rows)  # all of them, not a sample
    tensors = built.fit(seen, sparsity) if sparsity else nothing_skipped()
    realised = skipped_share(built, tensors, seen) if sparsity else 0.0
    return FittedActivations(tensors.get("threshold"), tensors.get("centre"), realised, tensors, built)


@contextmanager
def with_activations(
    model: Any,
    token_ids: Any,
    *,
    method: str,
    sparsity: float,
    budget: str | Mapping[str, Any] = "uniform",
    sites: str | Sequence[str] | None = "all",
    **options: Any,
) -> Iterator[Any]:
    """A model that runs sparse within the context, and is what it was afterwards, bit for bit.

    Args:
        model: a Hugging Face causal language model.
        token_ids: what the method is fitted to, `[samples, length]`; a budget that measures does so on the first of
            its `samples`.
        method: of `sparity methods activations.method`.
        sparsity: the share of the work to skip, in [0, 1).
        budget: how it is shared out among places: a name, or {name: {option: value}}.
        sites: `all` (or None) that the method is for, such as the gate's outputs for cats; `hidden`, `gate_output`,
            `neurons`, or roles such as ["gate", "up"].
        options: the method's, and the stage's `prompt`, `first` and `heal`.

    Yields:
        The model. Texts that are scored without a cache are sparse from token `first` on; a generation's prompt is
        dense unless `prompt="sparse"`.

    Raises:
        InvalidInput: as in a recipe.

    Example:
        >>> import sparity, torch
        >>> model = sparity.load("zoo:llama")
        >>> ids = torch.arange(64).view(2, 32)
        >>> dense = model(ids).logits
        >>> with sparity.with_activations(model, ids, method="teal", sparsity=0.4) as sparse:
        ...     print(torch.equal(sparse(ids).logits, dense))
        False
        >>> torch.equal(model(ids).logits, dense)
        True
    """
    with wrong_input()(_fitted)(model, token_ids, method, sparsity, budget, sites, options) as sparse:
        yield sparse


def _fitted(
    model: Any,
    token_ids: Any,
    method: str,
    sparsity: float,
    budget: str | Mapping[str, Any],
    sites: str | Sequence[str] | None,
    options: Mapping[str, Any],
) -> Any:
    own = {name: options[name] for name in STAGE_OPTIONS if name in options}
    rest = {name: value for name, value in options.items() if name not in own}
    where = None if sites == "all" else sites
    stage = Activations.model_validate(
        {"method": {method: rest}, "sparsity": sparsity, "budget": budget, "sites": where, **own}
    )
    tokens = torch.as_tensor(token_ids)
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise InvalidInput(f"token ids must be whole numbers [samples, length], got {list(tokens.shape)}")
    ids, decoder = tokens.long().cpu(), Decoder.open(model)
    with EvidenceInMemory(decoder, stage, ids) as known:
        decision = stage.decide(decoder, known)
    source, data = LiveSequential(stage.needs().statistics), dict[str, Tensor]()
    carried: Mapping[str, Tensor] = {}
    for visit in walk(decoder, decoder.inputs(ids, 1)):
        evidence = source.for_block(visit)
        evidence.before = carried
        fit = stage.fit(decoder, evidence, decision)
        carried = fit.carried
        data.update(fit.tensors)
    if stage.refines:
        data = dict(stage.refine(model, input_sites(model), data, ids))
    return _attached(model, stage, data)


@contextmanager
def _attached(model: Any, stage: Activations, data: Mapping[str, Tensor]) -> Iterator[Any]:
    with stage.attach(model, input_sites(model), data):
        yield model


def _check(samples: Any, weight: Any, partner: Any, sparsity: Any) -> None:
    if not isinstance(samples, Tensor) or samples.ndim not in (2, 3) or not samples.is_floating_point():
        shape = list(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise InvalidInput(f"activations must be floating-point [tokens, in] or [samples, tokens, in], got {shape}")
    if not samples.numel():
        raise InvalidInput(f"activations {list(samples.shape)} hold no token")
    if weight is not None and (
        not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != samples.shape[-1]
    ):
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise InvalidInput(f"weight must be [out, {samples.shape[-1]}] to fit the activations, got {shape}")
    if partner is not None and (not isinstance(partner, Tensor) or partner.shape != samples.shape):
        raise InvalidInput(f"partner must be like the activations, {list(samples.shape)}")
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise InvalidInput(f"sparsity {sparsity!r} must lie in [0, 1)")
    if weight is not None and not bool(weight.isfinite().all()):
        raise NumericalError("weight holds NaN or infinite numbers")
