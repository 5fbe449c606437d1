"""The plain export: a Hugging Face folder that loads anywhere, plus `sparity.json` and a model card."""

import json
import math
from pathlib import Path

from sparity import __version__
from sparity.checkpoints.companions import ROOMS, copy_files
from sparity.checkpoints.packed import NAMED_WEIGHTS, QUANTIZATION_KEYS, quantization_config
from sparity.checkpoints.recorded_scales import SCALES
from sparity.checkpoints.runtime_data import FOLDER
from sparity.checkpoints.shards import shard_name, write_index
from sparity.checkpoints.source import CheckpointSource, read_header
from sparity.files import file_hash, read_json_object, write_json, write_text
from sparity.measure.data.read_back import read_back
from sparity.measure.data.report import Candidate, Report
from sparity.measure.show.card import model_card
from sparity.measure.show.page_run import render_html
from sparity.pipeline.run.finished_pass import Done
from sparity.pipeline.run.job import Job
from sparity.stages.change import Change, last_of_each

FORMAT = 2
KEPT = "kept_indices.json"
RECORD = "sparity.json"


def write_config(job: Job, done: Done, folder: Path) -> None:
    """Index and configuration of a checkpoint: with its shards, all that is needed to open it."""
    write_plain_index(folder, sorted(folder.glob("model-*-of-*.safetensors")))
    if job.folder is not None:
        config = json.loads((job.folder / "config.json").read_text())
    else:
        config = json.loads(job.decoder.config.to_json_string(use_diff=False))
        config["architectures"] = [type(job.module).__name__]
    config.pop("torch_dtype", None)
    for key in (*QUANTIZATION_KEYS, NAMED_WEIGHTS):  # of another layout: what is written here is plain
        config.pop(key, None)
    config["dtype"] = str(job.decoder.dtype).removeprefix("torch.")
    config |= done.config
    if done.runtime:
        config["quantization_config"] = quantization_config("plain", done.runtime)
    write_json(folder / "config.json", config)


def write_companions(job: Job, done: Done, folder: Path) -> None:
    """Everything beside the shards: index, configuration, tokenizer, chat templates, licences."""
    if job.folder is not None:
        copy_files(job.folder, job.companions, folder)
    else:
        generation = getattr(job.module, "generation_config", None)
        if generation is not None:
            write_text(folder / "generation_config.json", generation.to_json_string())
    if done.kept:
        write_json(folder / KEPT, {"format": 1, "kept": done.kept})
    write_config(job, done, folder)


def write_results(job: Job, done: Done, changes: tuple[Change, ...], folder: Path, report: Report) -> None:
    """The model card, the report as a page and, last, `sparity.json` with the report and every other file's hash."""
    candidate: Candidate = report.candidates[0]
    write_text(folder / "README.md", model_card(report, candidate, job.companions))
    write_text(folder / "report.html", render_html(report))
    content = {
        "format": FORMAT,
        "layout": job.recipe.output.format,
        "sparity": __version__,
        "identity": job.identity(),
        "stages": [
            {"name": planned.stage.name, "options": planned.stage.model_dump(mode="json"), "decision": decision}
            for planned, decision in zip(job.stages, done.decisions, strict=True)
        ],
        "projections": {
            change.name: {"shape": list(change.shape_after), "zeros": change.zeros}
            for change in last_of_each(changes).values()
        },
        "files": file_hashes(folder),
        "report": report.to_dict(),
    }
    write_json(folder / RECORD, content)


def finished_report(folder: Path) -> Report:
    """The report that a finished run left in its folder.

    Raises:
        CorruptFile: the record is damaged.
    """
    return read_back(Report, read_json_object(folder / RECORD).get("report"), folder / RECORD)


def file_hashes(folder: Path) -> dict[str, str]:
    """Every file of a checkpoint but its record, with its hash; the state of a run is none of them."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != RECORD]
    rooms = [path for path in sorted(folder.iterdir()) if path.name.lower() in ROOMS]
    paths += [
        path for room in (folder / FOLDER, folder / SCALES, *rooms) for path in sorted(room.glob("*")) if path.is_file()
    ]
    return {str(path.relative_to(folder)): file_hash(path) for path in paths}


def plain_shard(number: int, total: int) -> str:
    """The file of plain shard `number` of `total`, counted from 1."""
    return shard_name("model", number, total)


def write_plain_index(folder: Path, shards: list[Path]) -> None:
    """Write the index over all shards, and check that every tensor is where it says."""
    homes: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, shape, dtype in read_header(shard):
            homes[name] = shard.name
            total += math.prod(shape) * dtype.itemsize
    write_index(folder / "model.safetensors.index.json", homes, total)
    CheckpointSource(folder)  # every shard is whole and every tensor is where the index says
