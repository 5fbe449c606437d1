"""What sparsity costs where: every part of a model pruned alone, at several ratios."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparity.calibration.store import StatisticsStore
from sparity.calibration.tokens import token_hash
from sparity.errors import InvalidInput, wrong_input
from sparity.files import read_json_object, write_json, write_text
from sparity.measure.data import machine
from sparity.measure.data.read_back import read_back
from sparity.measure.data.sensitivity_report import BlockFacts, Sensitivity, SensitivityReport
from sparity.measure.show.page_sensitivity import render_sensitivity
from sparity.models.model_parts import model_flops, parts
from sparity.pipeline.evidence.dense_statistics import dense_statistics, with_small
from sparity.pipeline.evidence.model_evidence import stored_evidence
from sparity.pipeline.run.job import Job, prepare
from sparity.pipeline.run.progress import Progress, Silence
from sparity.pipeline.run.result_folder import output_folder
from sparity.pipeline.run.run_folder import RunFolder
from sparity.pipeline.run.runner import check_output
from sparity.recipe import Recipe
from sparity.stages import Stage
from sparity.stages.trials import Trials

RATIOS = (0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class SensitivityResult:
    """A finished measurement, and the folder with `sensitivity.json` and `sensitivity.html`."""

    report: SensitivityReport
    path: Path
    _keep_alive: Any = field(default=None, repr=False)  # the temporary folder, when no output was named


@wrong_input()
def sensitivity(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    ratios: Sequence[float] = RATIOS,
    *,
    model: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
) -> SensitivityResult:
    """Prune every layer, and attention and MLP of every block and of all blocks, alone; measure KL and perplexity.

    Args:
        recipe: its model, calibration, score, pattern and solver are used, and the first text that it measures; its
            sparsity and budget are not.
        ratios: the sparsities to try, in (0, 1); a pattern with a sparsity of its own, such as 2:4, has only that.
        model: a folder, a Hugging Face name or a model in memory (not changed), in place of the recipe's.
        output: the folder of the result. Without one it lies in a temporary folder that lives as long as the result.
        device: "cpu", "cuda", ... or "auto".
        force: replace an existing output, or start an unfinished measurement over.
        resume: continue an unfinished measurement; what was measured is not measured again.

    Raises:
        SparityError: bad input, a conflict with another run, numerical trouble or a full disk.

    Example:
        >>> import sparity
        >>> recipe = {
        ...     "model": "zoo:llama",
        ...     "stages": [{"prune": {"score": "magnitude"}}],
        ...     "measure": {"perplexity": ["python-docs:held-out"], "window": 64, "windows": 1},
        ... }
        >>> result = sparity.sensitivity(recipe, [0.5])
        >>> whole = [row for row in result.report.rows if row.block is None]
        >>> [(row.part, row.kl > 0) for row in whole]
        [('attention', True), ('mlp', True)]
    """
    return execute_sensitivity(
        Recipe.read(recipe), ratios, Silence(), model=model, output=output, device=device, force=force, resume=resume
    )


def execute_sensitivity(
    recipe: Recipe,
    ratios: Sequence[float],
    progress: Progress,
    *,
    model: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
) -> SensitivityResult:
    """`sensitivity` for a checked recipe, with a progress that is told how it gets on."""
    progress.phase("checking")
    job = prepare(recipe, model, device)
    tried = _checked_ratios(job, ratios)
    if not job.texts:
        raise InvalidInput("sensitivity measures on a text: set `measure: {perplexity: [TEXT]}` in the recipe")
    path, temporary = output_folder(output, "sensitivity", resume)
    check_output(job, path)
    identity = {"sensitivity": job.identity(), "measured": [token_hash(text.ids) for text in job.texts]}
    with RunFolder.working(path, identity, force, resume) as folder:
        if folder.finished:
            return SensitivityResult(_finished(path / "sensitivity.json"), path, temporary)
        report = _measure(job, tried, folder, progress)
        write_json(folder.path / "sensitivity.json", report.to_dict())
        write_text(folder.path / "sensitivity.html", render_sensitivity(report))
    return SensitivityResult(report, path, temporary)


def _finished(path: Path) -> SensitivityReport:
    content = {key: value for key, value in read_json_object(path).items() if key != "format"}
    return read_back(SensitivityReport, content, path)


def _stage(job: Job) -> Stage:
    """The one stage whose cost is measured.

    Raises:
        InvalidInput: there are several, or it shares out no sparsity.
    """
    if len(job.stages) != 1:
        raise InvalidInput(f"sensitivity measures one stage alone: the recipe has {len(job.stages)}")
    planned = job.stages[0]
    if "sparsity" not in planned.draft:
        raise InvalidInput(f"{planned.stage.name} gives no projection a sparsity: there is nothing to vary")
    return planned.stage


def _checked_ratios(job: Job, ratios: Sequence[float]) -> tuple[float, ...]:
    stage = _stage(job)
    only = stage.only_sparsity
    if only is not None:
        return (only,)
    wrong = [ratio for ratio in ratios if isinstance(ratio, bool) or not 0 < ratio < 1]
    if wrong or not ratios:
        raise InvalidInput(f"ratios {list(ratios)}: give at least one, each between 0 and 1")
    return tuple(sorted(dict.fromkeys(float(ratio) for ratio in ratios)))


def _measure(job: Job, ratios: Sequence[float], folder: RunFolder, progress: Progress) -> SensitivityReport:
    stage = _stage(job)
    needs = stage.needs().statistics | stage.needs().gradients
    store = dense_statistics(job.opened, with_small(needs), job.store or folder.state / "statistics", progress)
    known = None if store is None else stored_evidence(store, needs).read
    text = job.texts[0]
    tokens = text.ids.reshape(-1, text.window)
    everything = list(parts(job.decoder))
    parameters = sum(torch.Size(shape).numel() for shape in job.decoder.source.shapes().values())
    flops = model_flops(job.decoder, text.window)
    progress.phase("measuring what sparsity costs")
    rows, started = [], time.perf_counter()
    with Trials(job.decoder, stage, folder, tokens, job.batch, known) as trials:
        dense = trials.measure({"sparsity": {}})
        for done, part in enumerate(everything, 1):
            for ratio in ratios:
                trial = trials.measure({"sparsity": dict.fromkeys(part.projections, ratio)})
                rows.append(
                    Sensitivity(
                        part=part.kind,
                        name=part.name,
                        block=part.block,
                        role=part.role,
                        projections=part.projections,
                        parameters=part.parameters / parameters,
                        flops=part.flops / flops,
                        sparsity=ratio,
                        kl=trial.kl,
                        perplexity=trial.perplexity,
                        change=trial.perplexity / dense.perplexity - 1,
                    )
                )
            progress.block(done, len(everything), time.perf_counter() - started)
            started = time.perf_counter()
        cosines = trials.cosines()
    return SensitivityReport(
        model=job.name,
        architecture=type(job.decoder.skeleton).__name__,
        method=stage.how,
        ratios=tuple(ratios),
        text=text.name,
        tokens=tokens.numel() - len(tokens),
        dense_perplexity=dense.perplexity,
        rows=tuple(rows),
        blocks=tuple(
            BlockFacts(index, cosine, _expert_tokens(job, index, store)) for index, cosine in enumerate(cosines)
        ),
        recipe=job.recipe.summary(),
        machine=machine.describe(),
    )


def _expert_tokens(job: Job, index: int, store: StatisticsStore | None) -> dict[str, int]:
    """How many calibration tokens were routed to each expert of a block."""
    if store is None:
        return {}
    seen = store.tokens(index)
    return {
        site.name.removesuffix(".gate_up"): seen[site.name]
        for site in job.decoder.sites(index)
        if site.projections[0].expert is not None and site.name.endswith(".gate_up")
    }
