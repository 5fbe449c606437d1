"""Prune a single matrix: the whole of static sparsity in one pure function."""

from typing import Any

from torch import Tensor

from sparity import registry
from sparity.calibration import Statistics
from sparity.calibration.statistics import GRADIENTS, OUTPUT_GRAM, REGIONAL
from sparity.errors import InvalidInput, suggestion, wrong_input
from sparity.static.matrices.matrix_input import check_finite, check_matrix, gathered
from sparity.static.prune.patterns.base import build_pattern
from sparity.static.prune.pruning import DEFAULT_SCORE, Pruning


@wrong_input()
def prune_weight(
    weight: Tensor,
    inputs: Tensor | None = None,
    *,
    gradients: Tensor | None = None,
    output_gradients: Tensor | None = None,
    score: str | None = None,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    solver: str = "mask_only",
    compare_within: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Prune one weight matrix; the arguments are not changed.

    Args:
        weight: `[out, in]`, any floating type.
        inputs: what the matrix is multiplied with, `[tokens, in]` (one sequence) or `[samples, tokens, in]`.
        gradients: the gradients that the score is about, `[out, in]` or `[samples, out, in]`.
        output_gradients: of each sequence's summed loss at the matrix's outputs, `[tokens, out]` or
            `[samples, tokens, out]`, which "llm_surgeon" reads.
        score: how much a weight matters; None is the solver's own ("obs" for "sparsegpt"), else "wanda".
        pattern: "unstructured", "N:M" with N kept of M, or "block:ROWSxCOLUMNS".
        sparsity: the share of weights to remove, in [0, 1); None is 0.5, or what the pattern says.
        solver: how the remaining weights make up for it.
        compare_within: "row" or "layer"; None is the score's own.
        options: options of the score, pattern and solver, flat: `damping=0.01`, `block_columns=128`, `count="exact"`.

    Returns:
        The pruned weight `[out, in]` in the type of `weight`, and the mask `[out, in]`, bool, True where kept.

    Raises:
        InvalidInput: unknown names or options, shapes that do not fit, a sparsity out of range.
        NumericalError: NaN or infinite numbers, or a Gram matrix that cannot be factorised.

    Example:
        >>> import sparity, torch
        >>> weight = torch.tensor([[4.0, -1.0, 2.0, 3.0]])  # [out, in]
        >>> inputs = torch.tensor([[1.0, 9.0, 1.0, 1.0]])  # [tokens, in]
        >>> sparity.prune_weight(weight, score="magnitude", pattern="2:4")[0]
        tensor([[4., 0., 0., 3.]])
        >>> pruned, keep = sparity.prune_weight(weight, inputs, score="wanda", pattern="2:4")
        >>> keep  # the second input is large
        tensor([[ True,  True, False, False]])
    """
    _check(weight, inputs, gradients, output_gradients)
    if not isinstance(pattern, str):
        raise InvalidInput(f"pattern: give its name, and its options beside it (tail=...), not {pattern!r}")
    solver_class = registry.get("prune.solver", solver)
    default_score: str = solver_class.own_score or DEFAULT_SCORE  # type: ignore[attr-defined]
    score_name = default_score if score is None else score
    owners = {"score": score_name, "solver": solver, "pattern": build_pattern(pattern).name}
    used: set[str] = set()
    nested: dict[str, dict[str, Any]] = {}
    for kind, name in owners.items():
        known = registry.option_types(registry.get(f"prune.{kind}", name))
        mine = {key: value for key, value in options.items() if key in known}
        if kind == "score" and name == solver_class.own_score:  # type: ignore[attr-defined]
            mine = {}  # the solver computes it, with options of its own
        used |= mine.keys()
        nested[kind] = mine
    for key in options.keys() - used:
        known_everywhere = [
            k for kind, name in owners.items() for k in registry.option_types(registry.get(f"prune.{kind}", name))
        ]
        raise InvalidInput(
            f'no option "{key}" in score {score_name}, pattern {pattern} or solver {solver}'
            f"{suggestion(key, known_everywhere)} (options: {', '.join(sorted(set(known_everywhere))) or 'none'})"
        )
    pruning = Pruning.of(
        {score_name: nested["score"]},
        {pattern: nested["pattern"]},
        {solver: nested["solver"]},
        sparsity,
        compare_within,
    )
    if pruning.across_layers:
        raise InvalidInput("compare_within global compares all matrices of a model; one matrix has row and layer")
    pruning.pattern.check_shape(weight.shape[0], weight.shape[1], "weight")
    return pruning.apply(weight.detach(), _statistics(pruning, inputs, gradients, output_gradients), pruning.sparsity)


def _statistics(
    pruning: Pruning, inputs: Tensor | None, gradients: Tensor | None, output_gradients: Tensor | None
) -> Statistics:
    of_gradients = pruning.needs & {*GRADIENTS, REGIONAL}
    instead = 'score="magnitude" with solver="mask_only"'
    statistics = gathered(pruning.needs - of_gradients, inputs, pruning.words, instead)
    known: dict[str, Tensor] = {}
    if gradients is not None:
        samples = gradients.detach().float().reshape(-1, *gradients.shape[-2:])  # [samples, out, in]
        squares = samples.square().mean(0)
        known |= {"gradient": samples.mean(0), "gradient_square": squares, REGIONAL: squares}
    if output_gradients is not None:
        rows = output_gradients.detach().float().flatten(0, -2)  # [tokens, out]
        known[OUTPUT_GRAM] = rows.T @ rows / len(rows)
    if missing := sorted(of_gradients - known.keys()):
        given = "output_gradients" if OUTPUT_GRAM in missing else "gradients"
        raise InvalidInput(
            f"{pruning.words} needs the statistics {', '.join(missing)}: pass `{given}`, or use {instead}"
        )
    return statistics.with_gradients(known)


def _check(weight: Tensor, inputs: Tensor | None, gradients: Tensor | None, output_gradients: Tensor | None) -> None:
    check_matrix(weight, inputs)
    rows, columns = weight.shape
    shapes = f"{list(weight.shape)} or [samples, {rows}, {columns}]"
    _check_gradients("gradients", gradients, (rows, columns), shapes)
    _check_gradients("output_gradients", output_gradients, (rows,), f"[tokens, {rows}] or [samples, tokens, {rows}]")


def _check_gradients(name: str, given: Tensor | None, last: tuple[int, ...], shapes: str) -> None:
    """Refuse what does not end in the sizes `last`, or has nothing in it."""
    if given is None:
        return
    if not isinstance(given, Tensor):
        raise InvalidInput(f"{name} must be a torch tensor, got {type(given).__name__}")
    if given.ndim not in (2, 3) or given.shape[-len(last) :] != last or not given.numel():
        raise InvalidInput(f"{name} must be {shapes}, got {list(given.shape)}")
    check_finite(**{name: given})
