"""Check a finished folder: hashes, realised sparsity and the legality of the pattern, from the files alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparity.errors import CorruptFile, InvalidInput
from sparity.files import expand, file_hash, read_json_object
from sparity.models import Decoder
from sparity.static.prune.patterns.base import build_pattern


@dataclass(frozen=True)
class Checked:
    """One projection: its sparsity now and as recorded, and groups that break the pattern."""

    name: str
    sparsity: float
    recorded: float
    breaches: int


@dataclass(frozen=True)
class Verification:
    """The outcome; `problems` is empty when all is well."""

    path: Path
    pattern: str
    sparsity: float
    files: int
    layers: tuple[Checked, ...]
    problems: tuple[str, ...]


def verify(path: str | Path) -> Verification:
    """Read every file of a folder that Sparity wrote and hold it against `sparity.json`.

    Raises:
        InvalidInput: the folder has no `sparity.json`.
        CorruptFile: the record or a shard cannot be read at all.
    """
    folder = expand(path)
    record = _record(folder)
    problems = _file_problems(folder, record["files"])
    pattern = build_pattern(record["pattern"])
    decoder = Decoder.open(folder)
    layers = []
    zeros = total = 0
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            for projection in block.projections:
                keep = projection.weight != 0
                zeros += int((~keep).sum())
                total += keep.numel()
                dense = record["targets"].get(projection.name, 0) == 0
                layers.append(
                    Checked(
                        name=projection.name,
                        sparsity=1 - float(keep.sum()) / keep.numel(),
                        recorded=record["sparsity"].get(projection.name, 0.0),
                        breaches=0 if dense else pattern.breaches(keep),
                    )
                )
    for layer in layers:
        if abs(layer.sparsity - layer.recorded) > 1e-9:
            problems.append(f"{layer.name}: sparsity {layer.sparsity:.6f}, recorded {layer.recorded:.6f}")
        if layer.breaches:
            problems.append(f"{layer.name}: {layer.breaches} groups break the pattern ({pattern.words})")
    return Verification(folder, pattern.words, zeros / total, len(record["files"]), tuple(layers), tuple(problems))


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "sparity.json"
    if not path.is_file():
        raise InvalidInput(f"{folder} has no sparity.json: it was not written by Sparity, or its run is unfinished")
    content = read_json_object(path)
    if content.get("format") != 1:
        raise InvalidInput(f"{path} has format {content.get('format')}; this release reads format 1: update sparity")
    for key, kind in (("files", str), ("targets", int | float), ("sparsity", int | float)):
        entries = content.get(key)
        if not isinstance(entries, dict) or not all(isinstance(value, kind) for value in entries.values()):
            raise CorruptFile(f'{path} is damaged (no usable "{key}" in it)')
    if "pattern" not in content:
        raise CorruptFile(f'{path} is damaged (no "pattern" in it)')
    return content


def _file_problems(folder: Path, hashes: dict[str, str]) -> list[str]:
    problems = []
    for name, expected in hashes.items():
        path = folder / name
        if Path(name).name != name or name in ("", ".."):
            problems.append(f"{name}: not a file of this folder")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif file_hash(path) != expected:
            problems.append(f"{name}: changed since it was written (hash differs)")
    unknown = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in hashes)
    return problems + [f"{name}: weights that are not in the record" for name in unknown]
