"""The search for a shape: scores of the model's parts, prices of every shape, an exact choice, and its recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparity import registry
from sparity.engine.kernels.prepared import MANY
from sparity.errors import InvalidInput, wrong_input
from sparity.measure.data import machine
from sparity.measure.data.shape_report import ShapeAxis, ShapePoint, ShapeReport
from sparity.measure.show.table_shape import describe_shape
from sparity.measure.timing.generation import check_context
from sparity.models import Decoder
from sparity.pipeline.run.job import Job, prepare
from sparity.pipeline.run.progress import Progress, Silence
from sparity.pipeline.studies.shapes.answer import recipe_of
from sparity.pipeline.studies.shapes.axes import Axis, Grid, axes_of
from sparity.pipeline.studies.shapes.limits import Limits
from sparity.pipeline.studies.shapes.prices import Clock, Costs, kernel_seconds, measured_rests, priced
from sparity.pipeline.studies.shapes.search import Candidate, best, candidates, closest, front
from sparity.pipeline.studies.shapes.tensors import Layout, Legal, layout_of
from sparity.pipeline.studies.tuning.costs import TOKENS, check_kernels
from sparity.pipeline.studies.tuning.study import CALIBRATION
from sparity.recipe import Recipe
from sparity.static.structure.asking import removing
from sparity.static.structure.methods.base import Method
from sparity.static.structure.ranked import Ranked
from sparity.static.structure.subject import Subject


@wrong_input()
def plan_shape(
    model: str | Path | nn.Module,
    at_least: str | None = None,
    *,
    prefill: str | None = None,
    at_most: int | str | None = None,
    method: str = "minitron",
    options: Mapping[str, Any] | None = None,
    dimensions: Sequence[str] | None = None,
    steps: int = 8,
    multiple_of: int = 32,
    least: float = 0.25,
    calibration: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
) -> ShapeReport:
    """The uniform shape of a model that gives up least within limits of speed and bytes, and the recipe for it.

    All combinations of sizes are tried. What a shape gives up is a proxy: the shares of importance that go, summed over
    dimensions; nothing is cut or measured but time.

    Args:
        model: a folder, a Hugging Face name, or a model in memory (not changed).
        at_least: the least speed of decoding, as "1.5x" of dense or "40 tokens/s".
        prefill: the least speed of a prompt, written likewise.
        at_most: the most bytes of the plain checkpoint, a number or as "100MB".
        method: a `structure.method` that ranks the parts of a dimension; its scores are the importance.
        options: the method's own, without `dimension` and `multiple_of`.
        dimensions: that may become smaller, of `depth`, `mlp_channels`, `kv_groups` (`query_heads`), `hidden_size`;
            without them, all that the model's family allows.
        steps: sizes are multiples of 1 / `steps` of the whole.
        multiple_of: channels and hidden sizes are rounded up to multiples of it.
        least: the share of a dimension that stays at least.
        calibration: a recipe's section, the text for the scores.
        dtype: of the model; the kernels take bfloat16.

    Raises:
        InvalidInput: no shape is within the limits (the message says which is closest), a limit that is none, an
            unknown dimension or method, a model whose blocks are not alike, or speed without compiled kernels.
        SparityError: the machine is too busy to time its kernels.

    Example:
        >>> import sparity
        >>> kinds = ["depth", "mlp_channels"]
        >>> found = sparity.plan_shape("zoo:llama", at_most="6MB", method="magnitude", dimensions=kinds)
        >>> found.answer.sizes, found.answer.bytes
        ({'depth': 4, 'mlp_channels': 384}, 5803392)
    """
    grid = Grid(steps, multiple_of, least)
    limits = Limits.of(at_least, prefill, at_most)
    base: dict[str, Any] = {} if isinstance(model, nn.Module) else {"model": str(model)}
    base |= {"dtype": dtype, "calibration": dict(calibration or CALIBRATION)}
    return execute_plan(base, limits, grid, method, options or {}, dimensions, Silence(), model=model)


def execute_plan(
    base: Mapping[str, Any],
    limits: Limits,
    grid: Grid,
    method: str,
    options: Mapping[str, Any],
    dimensions: Sequence[str] | None,
    progress: Progress,
    *,
    model: str | Path | nn.Module | None = None,
    clock: Clock = kernel_seconds,
) -> ShapeReport:
    """`plan_shape` with a progress that is told how it gets on; `base` is a recipe without stages."""
    progress.phase("checking")
    built = _ranked(method, options)
    probe = [removing(method, options, 0.5)]  # so that its text is read
    recipe = Recipe.read({**base, "stages": probe, "measure": {"speed": None}})
    job = prepare(recipe, model if isinstance(model, nn.Module) else None, "cpu")
    if limits.timed:
        check_kernels(job.decoder.dtype, "limit bytes alone")
        check_context("a shape's prefill", job.decoder.config, MANY, TOKENS)
    dense = job.dense_model()
    progress.phase("scoring parts")
    scores = built.scores(Subject(dense, job.tokens))
    axes = axes_of(job.decoder, scores, dimensions, grid)
    layout = layout_of(job.decoder, axes)
    costs = _costs(dense, axes, layout, limits, clock, progress)
    found = candidates(axes, Legal(job.decoder), costs)
    return _report(job, base, limits, method, options, axes, found)


def _ranked(method: str, options: Mapping[str, Any]) -> Method:
    built: Method = registry.create("structure.method", method, options)
    if not isinstance(built, Ranked):
        known = [name for name in registry.names("structure.method") if _ranks(name)]
        raise InvalidInput(
            f"{method} does not rank the parts of one dimension after another: use one of {', '.join(known)}"
        )
    taken = [name for name in ("dimension", "multiple_of") if name in options]
    if taken:
        raise InvalidInput(f"{method}: the search sets {taken[0]} itself: leave it out")
    return built


def _ranks(name: str) -> bool:
    return issubclass(registry.get("structure.method", name), Ranked)


def _costs(dense: Any, axes: Sequence[Axis], layout: Layout, limits: Limits, clock: Clock, progress: Progress) -> Costs:
    if not limits.timed:
        return Costs(layout)
    progress.phase("timing matrices of every size")
    known = priced(axes, layout, clock, lambda done, of: progress.block(done, of, 0.0))
    progress.phase("timing the dense model")
    ids = torch.arange(MANY) % int(dense.config.vocab_size)
    return replace(Costs(layout, clock=known), rests=measured_rests(dense, layout, ids, known))


def _report(
    job: Job,
    base: Mapping[str, Any],
    limits: Limits,
    method: str,
    options: Mapping[str, Any],
    axes: Sequence[Axis],
    found: Sequence[Candidate],
) -> ShapeReport:
    whole = next(one for one in found if all(one.sizes[axis.name] == axis.whole for axis in axes))
    most = limits.most(whole.costs)
    chosen = best(found, most)
    if chosen is None:
        raise InvalidInput(_missed(limits, closest(found, most), whole))
    decoder: Decoder = job.decoder
    return ShapeReport(
        model=job.name,
        architecture=type(decoder.skeleton).__name__,
        method=method,
        limits=limits.words,
        prompt=MANY,
        axes=tuple(ShapeAxis(axis.name, axis.whole, axis.sizes, axis.losses) for axis in axes),
        shapes=len(found),
        able=sum(one.keeps(most) for one in found),
        dense=_point(whole),
        answer=_point(chosen),
        front=tuple(_point(one) for one in front(found, limits.goals)),
        recipe=recipe_of(base, decoder, axes, chosen.sizes, method, options),
        machine=machine.describe(),
    )


def _point(one: Candidate) -> ShapePoint:
    costs = one.costs
    return ShapePoint(dict(one.sizes), one.loss, round(costs["bytes"]), costs.get("decode"), costs.get("prefill"))


def _missed(limits: Limits, near: Candidate, whole: Candidate) -> str:
    return (
        f"no shape keeps {limits.words}: the closest is {describe_shape(_point(near), _point(whole), MANY)}; relax the "
        "limit, or allow smaller sizes (least, more dimensions)"
    )
