"""A recipe's roofline, before anything is pruned."""

import torch

from sparity.engine.kernels import native
from sparity.measure.data.hardware import DATA_SHEETS, Hardware, read_rate
from sparity.measure.data.outcome import Totals
from sparity.measure.data.roofline import Roof, Shape, roof
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.plan import Plan, flops_per_second


def this_machine() -> Hardware:
    """This processor with the threads that PyTorch has, measured in a second."""
    return Hardware(
        name=f"this machine, {torch.get_num_threads()} threads",
        bandwidth=read_rate(),
        flops=flops_per_second(torch.bfloat16, "cpu"),
        two_of_four=False,
        engine=native.unavailable() is None,
        source="measured",
    )


def rooflines(job: Job, plan: Plan, prompt: int, batch: int) -> tuple[Roof, ...]:
    """The recipe on this machine and on those of the data sheets."""
    shape = shape_of(job, plan)
    return tuple(roof(shape, each, prompt, batch) for each in (this_machine(), *DATA_SHEETS.values()))


def shape_of(job: Job, plan: Plan) -> Shape:
    """What the recipe leaves of every projection."""
    changes = [
        (planned.stage, change)
        for planned, stage in zip(job.stages, plan.stages, strict=True)
        for change in stage.changes
    ]
    touched = {change.name for _, change in changes}
    sizes = {
        projection.name: projection.weight.numel()
        for index in range(len(job.decoder))
        for site in job.decoder.sites(index)
        for projection in site.projections
    }
    return Shape(
        outcomes=Totals.of(change for _, change in changes).outcomes,
        patterns={change.name: stage.zeros_lie for stage, change in changes if stage.zeros_lie is not None},
        untouched=sum(size for name, size in sizes.items() if name not in touched),
        config=job.decoder.config,
        packed=job.recipe.output.format == "packed",
    )
