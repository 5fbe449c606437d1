"""What the passes of a run have found and done so far, and the folder of one that is finished.

PASSES/pass-1-0123456789abcdef/     an ordinary checkpoint, which the next pass opens
    pass.json                       what it rests on, what was done, and the hash of every file; written last
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sparity.errors import CorruptFile, RunConflict
from sparity.files import file_hash, make_folder, write_json
from sparity.pipeline.run.pass_folder import START_OVER, PassFolder, read_state
from sparity.stages import Change, Decision

FORMAT = 1
MARK = "pass.json"
STATE = ".pass"  # of a pass that is not finished, inside its folder

MODEL = "model"  # in place of a block: what all of them share
Kept = Mapping[str, Mapping[str, list[int]]]  # block of the dense model -> dimension -> its units that are left


@dataclass(frozen=True)
class Done:
    """What all passes so far have found and done.

    Attributes:
        decisions: of each stage.
        records: of each block that was committed: its seconds and changes.
        config: the configuration's attributes that changed.
        kept: which units of the dense model's dimensions are left, where any were cut.
        runtime: of each stage that leaves data for run time its name, options and file.
        trainings: of each stage that trained its name, the losses of its curves by step, and notes.
    """

    decisions: tuple[Decision, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)
    runtime: tuple[Mapping[str, Any], ...] = ()
    trainings: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Done":
        """From JSON; raises `KeyError` or `TypeError` for something else."""
        sequences = {key: tuple(content[key]) for key in ("decisions", "records", "runtime", "trainings")}
        found = cls(**{**content, **sequences})
        changes_of(found.records)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @property
    def changes(self) -> tuple[Change, ...]:
        """What every stage did to every projection."""
        return changes_of(self.records)

    @property
    def seconds_per_block(self) -> tuple[float, ...]:
        """The time of every block that was committed."""
        return tuple(record["seconds"] for record in self.records)


def changes_of(records: tuple[dict[str, Any], ...]) -> tuple[Change, ...]:
    """The changes of committed blocks.

    Raises:
        CorruptFile: a record is damaged.
    """
    try:
        return tuple(Change.read(change) for record in records for change in record["changes"])
    except (KeyError, TypeError) as error:
        raise CorruptFile(f"the run's record of a finished block is damaged ({error}): {START_OVER}") from error


def begin(place: Path) -> PassFolder:
    """The folder of a pass that is begun or continued; what a killed process was writing is removed."""
    state = place / STATE
    make_folder(state)
    for folder in (place, state):
        for entry in folder.iterdir():
            if entry.name.startswith(".") and entry != state:
                entry.unlink()
    return PassFolder(place, state)


def finish(place: Path, key: str, done: Done) -> None:
    """Make a pass final: its state goes, and the mark names what it rests on and every file."""
    shutil.rmtree(place / STATE)
    files = {str(path.relative_to(place)): file_hash(path) for path in sorted(place.rglob("*")) if path.is_file()}
    write_json(place / MARK, {"format": FORMAT, "key": key, "done": done.to_dict(), "files": files})


def finished(place: Path, key: str) -> Done | None:
    """What a finished pass and those before it did; None where the folder holds none.

    Raises:
        CorruptFile: a file is missing or altered.
        RunConflict: the folder is that of another pass.
    """
    if not (place / MARK).is_file():
        return None
    content = read_state(place / MARK)
    advice = f"delete {place}, and the pass is done again"
    if content.get("format") != FORMAT or content.get("key") != key:
        raise RunConflict(f"{place} holds a pass of another recipe or model: {advice}")
    files = content.get("files")
    if not isinstance(files, dict) or not isinstance(content.get("done"), dict):
        raise CorruptFile(f"{place / MARK} is damaged: {advice}")
    for name, expected in files.items():
        path = place / str(name)
        if not path.resolve().is_relative_to(place.resolve()) or not path.is_file() or file_hash(path) != expected:
            raise CorruptFile(f"{path} is missing or was altered since the pass was finished: {advice}")
    try:
        return Done.read(content["done"])
    except (KeyError, TypeError, CorruptFile) as error:
        raise CorruptFile(f"{place / MARK} is damaged ({error}): {advice}") from error


def with_kept(done: Done, block: str, kept: Mapping[str, list[int]]) -> Done:
    """The same with a block's further cuts, in units of the dense model."""
    if not kept:
        return done
    before = dict(done.kept.get(block, {}))
    for dimension, units in kept.items():
        earlier = before.get(dimension)
        before[dimension] = list(units) if earlier is None else [earlier[unit] for unit in units]
    return replace(done, kept={**done.kept, block: before})


def dense_block(done: Done, index: int) -> int:
    """Which of the dense model's blocks is block `index` now."""
    depth = done.kept.get(MODEL, {}).get("depth")
    return index if depth is None else depth[index]
