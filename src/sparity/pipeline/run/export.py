"""The plain export: a Hugging Face folder that loads anywhere, plus `sparity.json` and a model card."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

from sparity import __version__
from sparity.checkpoints.packed import QUANTIZATION_KEYS
from sparity.checkpoints.source import CheckpointSource, read_header
from sparity.files import file_hash, write_atomically, write_json, write_text
from sparity.measure.data.report import Candidate, Report
from sparity.measure.show.card import model_card
from sparity.measure.show.page_run import render_html
from sparity.pipeline.run.job import Job

FORMAT = 1
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "LICENSE*",
)  # fmt: skip


def write_companions(job: Job, folder: Path) -> None:
    """Everything beside the shards that transformers needs: index, configuration, tokenizer, chat template."""
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    write_plain_index(folder, shards)
    if job.folder is not None:
        for pattern in COMPANIONS:
            for source in sorted(job.folder.glob(pattern)):
                if source.is_file():
                    write_atomically(folder / source.name, partial(shutil.copyfile, source))
        config = json.loads((job.folder / "config.json").read_text())
    else:
        config = json.loads(job.decoder.config.to_json_string(use_diff=False))
        config["architectures"] = [type(job.module).__name__]
        generation = getattr(job.module, "generation_config", None)
        if generation is not None:
            write_text(folder / "generation_config.json", generation.to_json_string())
    config.pop("torch_dtype", None)
    for key in QUANTIZATION_KEYS:  # of a packed model: what is written here is plain
        config.pop(key, None)
    config["dtype"] = str(job.decoder.dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)


def write_results(job: Job, folder: Path, report: Report) -> None:
    """The model card, the report as a page and, last, `sparity.json` with the report and every other file's hash."""
    candidate: Candidate = report.candidates[0]
    write_text(folder / "README.md", model_card(report, candidate))
    write_text(folder / "report.html", render_html(report))
    hashes = {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}
    content = {
        "format": FORMAT,
        "layout": job.recipe.output.format,
        "sparity": __version__,
        "pattern": job.prune.pattern,
        "identity": job.identity(),
        "sparsity": {layer.name: layer.sparsity for layer in candidate.layers},
        "targets": job.targets,
        "files": hashes,
        "report": report.to_dict(),
    }
    write_json(folder / "sparity.json", content)


def weight_bytes(folder: Path) -> int:
    """The size of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def shard_name(number: int, total: int) -> str:
    """The file of shard `number` of `total`, counted from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_plain_index(folder: Path, shards: list[Path]) -> None:
    """Write the index over all shards, and check that every tensor is where it says."""
    homes: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, shape, dtype in read_header(shard):
            homes[name] = shard.name
            total += math.prod(shape) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    write_json(folder / "model.safetensors.index.json", index)
    CheckpointSource(folder)  # every shard is whole and every tensor is where the index says
