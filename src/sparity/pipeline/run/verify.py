"""Check a finished folder: hashes, shapes, zeros, and what each stage promised, from the files alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparity import registry
from sparity.checkpoints.coded_sizes import CodedSizes, coded_sizes
from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.weight_files import weight_bytes
from sparity.errors import CorruptFile, InvalidInput, SparityError, wrong_input
from sparity.files import expand, file_hash, read_json_object
from sparity.models import Decoder
from sparity.models.block import Projection
from sparity.pipeline.run.export import FORMAT, RECORD
from sparity.stages import Decision, Stage

FOREIGN = "weights that are not in the record"


@dataclass(frozen=True)
class Checked:
    """One projection: its zeros now and as recorded."""

    name: str
    shape: tuple[int, int]
    zeros: float
    recorded: float


@dataclass(frozen=True)
class Verification:
    """The outcome; `problems` is empty when all is well.

    Attributes:
        stages: what each stage did, in words.
        zeros: the share of the weights of all projections that is zero.
        files: how many were compared with their hashes.
        bytes: of the files that are loaded, with their headers and tables.
        coded: what of them lies under a Huffman code.
    """

    path: Path
    stages: tuple[str, ...]
    zeros: float
    files: int
    projections: tuple[Checked, ...]
    problems: tuple[str, ...]
    bytes: int
    coded: CodedSizes


@wrong_input()
def verify(path: str | Path) -> Verification:
    """Read every file of a folder that Sparity wrote and hold it against `sparity.json`.

    Raises:
        InvalidInput: the folder has no `sparity.json`.
        CorruptFile: the record or a shard cannot be read at all.
    """
    folder = expand(path)
    record = _record(folder)
    stages = _stages(folder / RECORD, record["stages"])
    problems = _file_problems(folder, record["files"])
    try:
        decoder = Decoder.open(folder)
    except CorruptFile as error:
        foreign = next((problem for problem in problems if problem.endswith(FOREIGN)), None)
        if foreign is None:
            raise
        raise CorruptFile(f"{error} ({foreign})") from error
    checked = []
    zeros = total = 0
    known = record["projections"]
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            for projection in block.projections:
                here = int((projection.weight == 0).sum())
                zeros, total = zeros + here, total + projection.weight.numel()
                entry = known.get(projection.name)
                if entry is not None:
                    found = _checked(projection, here, entry)
                    checked.append(found)
                    problems += _differences(found, entry)
            for stage, decision in stages:
                try:
                    problems += stage.verify(block, decision)
                except SparityError:
                    raise
                except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                    raise CorruptFile(f"{folder / RECORD} is damaged (what {stage.name} decided)") from error
    absent = sorted(known.keys() - {found.name for found in checked})
    problems += [f"{name}: recorded, but not a projection of this model" for name in absent]
    words = tuple(stage.words for stage, _ in stages)
    return Verification(
        path=folder,
        stages=words,
        zeros=zeros / max(total, 1),
        files=len(record["files"]),
        projections=tuple(checked),
        problems=tuple(problems),
        bytes=weight_bytes(folder),
        coded=coded_sizes(CheckpointSource(folder)),
    )


def _checked(projection: Projection, zeros: int, entry: dict[str, Any]) -> Checked:
    rows, columns = projection.weight.shape
    return Checked(projection.name, (rows, columns), zeros / projection.weight.numel(), float(entry["zeros"]))


def _differences(found: Checked, entry: dict[str, Any]) -> list[str]:
    problems = []
    if list(found.shape) != entry["shape"]:
        problems.append(f"{found.name}: shape {list(found.shape)}, recorded {entry['shape']}")
    if not abs(found.zeros - found.recorded) <= 1e-9:
        problems.append(f"{found.name}: sparsity {found.zeros:.6f}, recorded {found.recorded:.6f}")
    return problems


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise InvalidInput(f"{folder} has no {RECORD}: it was not written by Sparity, or its run is unfinished")
    content = read_json_object(path)
    if content.get("format") != FORMAT:
        raise InvalidInput(
            f"{path} has format {content.get('format')}; this release reads format {FORMAT}: "
            "use the release that wrote it"
        )
    files, projections = content.get("files"), content.get("projections")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise CorruptFile(f'{path} is damaged (no usable "files" in it)')
    if not isinstance(projections, dict) or not all(_is_entry(value) for value in projections.values()):
        raise CorruptFile(f'{path} is damaged (no usable "projections" in it)')
    if not isinstance(content.get("stages"), list):
        raise CorruptFile(f'{path} is damaged (no usable "stages" in it)')
    return content


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("zeros")) not in (int, float):
        return False
    shape = value.get("shape")
    return 0 <= value["zeros"] <= 1 and isinstance(shape, list) and all(type(side) is int for side in shape)


def _stages(path: Path, entries: list[Any]) -> list[tuple[Stage, Decision]]:
    found: list[tuple[Stage, Decision]] = []
    for place, entry in enumerate(entries):
        try:
            stage = registry.get("stage", entry["name"]).model_validate(entry["options"])  # type: ignore[attr-defined]
            found.append((stage, dict(entry["decision"])))
        except (KeyError, TypeError, ValueError) as error:
            why = str(error).splitlines()[0] if isinstance(error, SparityError) else "its options make no sense"
            raise CorruptFile(f"{path} is damaged (stage {place}: {why})") from error
    return found


def _file_problems(folder: Path, hashes: dict[str, str]) -> list[str]:
    problems = []
    for name, expected in hashes.items():
        path = folder / name
        if not _is_inside(folder, name):
            problems.append(f"{name}: not a file of this folder")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif file_hash(path) != expected:
            problems.append(f"{name}: changed since it was written (hash differs)")
    unknown = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    return problems + [f"{name}: {FOREIGN}" for name in unknown if name not in hashes]


def _is_inside(folder: Path, name: str) -> bool:
    parts = Path(name).parts
    return 0 < len(parts) <= 2 and ".." not in parts and not Path(name).is_absolute() and str(Path(name)) == name
