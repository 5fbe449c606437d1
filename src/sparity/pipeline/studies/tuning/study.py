"""The search: prices, losses, an exact choice of everything, and one measured run of the recipe that it comes to."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparity.calibration.tokens import token_hash
from sparity.errors import wrong_input
from sparity.files import read_json_object, write_json, write_text
from sparity.measure.data.read_back import read_back
from sparity.measure.data.tune_report import TuneReport
from sparity.measure.show import numbers
from sparity.measure.show.page_tune import render_tune
from sparity.models import Decoder
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.progress import Progress, Silence
from sparity.pipeline.run.result_folder import output_folder
from sparity.pipeline.run.run_folder import RunFolder
from sparity.pipeline.run.runner import check_output
from sparity.pipeline.run.tokens import default_device
from sparity.pipeline.studies.tuning.costs import Goal
from sparity.pipeline.studies.tuning.losses import Measure
from sparity.pipeline.studies.tuning.menu import Choice, choices_of
from sparity.pipeline.studies.tuning.settings import Tuning
from sparity.pipeline.studies.tuning.units import units_of
from sparity.pipeline.studies.tuning.work import Study
from sparity.recipe import Recipe

CALIBRATION = {"text": "python-docs:calibration", "documents": "joined", "samples": 32, "length": 256, "batch": 8}
MEASURED = {"perplexity": ["python-docs:held-out"], "window": 256, "windows": 8}
SPEED = {"prompt": 64, "tokens": 32, "rounds": 5}


@dataclass(frozen=True)
class TuneResult:
    """A finished search: the report, and the folder with `tune.json`, `tune.html`, `recipe.yaml` and the model."""

    report: TuneReport
    path: Path
    _keep_alive: Any = field(default=None, repr=False)  # the temporary folder, when no output was named

    @property
    def met(self) -> bool:
        """Whether all limits are kept."""
        return self.report.verdict is None


@wrong_input()
def tune(
    model: str | Path,
    max_ppl: str | None = None,
    maximise: Goal = "tokens/s",
    *,
    max_kl: float | None = None,
    at_least: str | None = None,
    choices: str | Path | Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    measure: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    how: Measure = "auto",
    minutes: float = 10.0,
    samples: int = 8,
    pairs: int = 0,
    runs: int = 3,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
) -> TuneResult:
    """Choose weights, bits and skipped inputs for every part of a model, for the most speed within a limit of quality.

    Args:
        model: a folder or a Hugging Face name.
        max_ppl: the largest rise of perplexity, as "+5%".
        maximise: `tokens/s` of decoding, `prefill` (the speed of a prompt), or `bytes` (that are saved).
        max_kl: the largest KL to the dense model, in nats per token.
        at_least: the least gain, as "1.5x"; where it and the limits cannot both be kept, the answer says so.
        choices: a menu, see `docs/tune.md`; without one, that of the page.
        calibration: a recipe's section: the text of statistics, and of what single units lose.
        measure: a recipe's section with one text, on which the limit holds.
        dtype: of the model; the kernels take bfloat16.
        how: measure each unit alone, roles and blocks (`separable`), or what `minutes` allow (`auto`).
        minutes: about how long it may take to measure each unit alone.
        samples: calibration sequences on which units are measured.
        pairs: pairs of units whose errors are measured together.
        runs: of the answer, at most.
        output: the folder of the result; without one it lies in a temporary folder that lives as long as the result.
        device: "cpu", "cuda", ... or "auto".
        force: replace an existing output, or start an unfinished search over.
        resume: continue an unfinished search; what was measured is not measured again.

    Raises:
        SparityError: bad input, a machine too busy to be timed, numerical trouble or a full disk.

    Example:
        >>> import sparity
        >>> menu = {
        ...     "weights": {"dense": []},
        ...     "values": {"same": {"encoding": "same"}, "int8": {"encoding": "int8", "stages": [
        ...         {"quantize": {"bits": 8, "grid": {"integers": {"even": True}}}}]}},
        ... }
        >>> text = {"perplexity": ["python-docs:held-out"], "window": 64, "windows": 1}
        >>> found = sparity.tune("zoo:llama", "+5%", "bytes", choices=menu, measure=text, samples=1, runs=1)
        >>> found.met, {unit.choice for unit in found.report.units}
        (True, {'int8'})
    """
    asked = Tuning.of(max_ppl, maximise, max_kl, at_least, choices, how, minutes, samples, pairs, runs)
    base = {"model": str(model), "dtype": dtype, "calibration": dict(calibration or CALIBRATION)}
    base["measure"] = dict(measure or MEASURED)
    return execute_tune(base, asked, Silence(), output=output, device=device, force=force, resume=resume)


def execute_tune(
    base: Mapping[str, Any],
    asked: Tuning,
    progress: Progress,
    *,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
) -> TuneResult:
    """`tune` for checked settings, with a progress that is told how it gets on; `base` is a recipe without stages."""
    progress.phase("checking")
    base = _with_speed(base, asked)
    decoder = Decoder.open(base["model"], default_device(device), base["dtype"])
    choices = choices_of(asked.menu, decoder)
    job = prepare(Recipe.read({**base, "stages": _every(choices)}), None, device)
    path, temporary = output_folder(output, "tune", resume)
    check_output(job, path)
    identity = {"tune": asked.identity(), **job.identity(), "measured": [token_hash(text.ids) for text in job.texts]}
    with RunFolder.working(path, identity, force, resume) as folder:
        if not folder.finished:
            begun = time.perf_counter()
            study = Study(base, asked, job, choices, units_of(job.decoder), folder, progress)
            report = study.run(begun)
            write_json(folder.path / "tune.json", report.to_dict())
            write_text(folder.path / "tune.html", render_tune(report))
            write_text(folder.path / "recipe.yaml", numbers.recipe_yaml(dict(report.recipe)))
    return TuneResult(_finished(path / "tune.json"), path, temporary)


def _finished(path: Path) -> TuneReport:
    content = {key: value for key, value in read_json_object(path).items() if key != "format"}
    return read_back(TuneReport, content, path)


def _with_speed(base: Mapping[str, Any], asked: Tuning) -> dict[str, Any]:
    measure = {"speed": None if asked.goal == "bytes" else SPEED, **base["measure"]}
    return {**base, "measure": measure, "accept": asked.limits.accept}


def _every(choices: Sequence[Choice]) -> list[Any]:
    """One stage of every kind, so that all that they read is there."""
    kinds = {stage.name: stage for axis in range(3) for choice in choices for stage in choice.axes[axis]}
    return [{name: stage.model_dump(exclude_unset=True)} for name, stage in kinds.items()]
