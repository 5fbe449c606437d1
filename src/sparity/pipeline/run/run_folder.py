"""The folder of a run: what is finished, what it belongs to, and who is writing to it.

A run works in `OUT.partial`. Each finished block is a shard of the final checkpoint, committed together with the
hidden states behind it; `OUT` appears, complete, by one rename at the end. What it replaces is moved into the run's
state first, from where a run that was stopped between the two renames puts it back, and is removed last.
"""

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparity.calibration.mapped import create_tensor, flush, open_tensor
from sparity.checkpoints.shards import write_tensors
from sparity.errors import CorruptFile, InvalidInput, RunConflict, SparityError
from sparity.files import file_hash, flush_folder, lock, make_folder, read_json_object, write_json

log = logging.getLogger(__name__)

STATE = ".sparity"
REPLACED = "replaced"
START_OVER = "start again with --force"


@dataclass(frozen=True)
class Committed:
    """What is committed: the number of blocks, the hidden states behind them (file and hash), and their records."""

    blocks: int = 0
    hidden: str | None = None
    hidden_hash: str | None = None
    records: tuple[dict[str, Any], ...] = ()


class RunFolder:
    """The working folder of one run, locked while it is used."""

    def __init__(self, output: Path, force: bool = False) -> None:
        self.output = Path(os.path.abspath(output))  # "." and "x/.." have names then
        if not self.output.name:
            raise InvalidInput(f"output {output} is the root of the file system: name a folder")
        try:
            str(self.output).encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"output {output!r}: safetensors writes only to names in UTF-8") from error
        self.path = self.output.with_name(self.output.name + ".partial")
        self.state = self.path / STATE
        self.resumed = False
        self._force = force

    @classmethod
    @contextmanager
    def open(cls, output: Path, identity: dict[str, Any], force: bool, resume: bool) -> Iterator["RunFolder"]:
        """Create or continue the working folder for `output`.

        Raises:
            RunConflict: the output exists, another run holds the folder, or the folder belongs to another run.
        """
        folder = cls(output, force)
        folder._refuse_existing()
        make_folder(folder.state)
        with lock(folder.state / "lock"):
            folder._put_back()
            folder._refuse_existing()
            folder._claim(identity, resume)
            yield folder

    @property
    def progress(self) -> Committed:
        """What earlier runs committed."""
        path = self.state / "progress.json"
        if not path.exists():
            return Committed()
        content = _read_json(path)
        try:
            found = Committed(**{**content, "records": tuple(content["records"])})
            sound = found.blocks == len(found.records) > 0
            sound = sound and all({"seconds", "layers"} <= set(record) for record in found.records)
        except (KeyError, TypeError) as error:
            raise CorruptFile(f"{path} is damaged ({error}): {START_OVER}") from error
        if not sound or found.hidden not in (None, _hidden_name(found.blocks)):
            raise CorruptFile(f"{path} is damaged (its entries contradict one another): {START_OVER}")
        return found

    @property
    def threads(self) -> int:
        """The thread count under which the run began; results are reproducible bit by bit only with the same."""
        path = self.state / "manifest.json"
        threads = _read_json(path).get("threads")
        if type(threads) is not int or threads < 1:
            raise CorruptFile(f"{path} is damaged (threads: {threads!r}): {START_OVER}")
        return threads

    def save_shard(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard of the checkpoint."""
        write_tensors(self.path / name, tensors, {"format": "pt"})

    def room(self, blocks: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory in a file for the hidden states behind `blocks` blocks; those before the last of them stay whole."""
        return create_tensor(self.state / _hidden_name(blocks), shape, dtype)

    def commit(self, blocks: int, hidden: Tensor | None, record: dict[str, Any]) -> None:
        """Make block number `blocks` final: first the hidden states in their `room`, then the record that names it."""
        previous = self.progress
        name = digest = None
        if hidden is not None:
            name = _hidden_name(blocks)
            flush(self.state / name)
            digest = file_hash(self.state / name)
        progress = Committed(blocks, name, digest, (*previous.records, record))
        write_json(self.state / "progress.json", dataclasses.asdict(progress))

    def remember(self, name: str, value: dict[str, Any]) -> None:
        """Keep something that the run found out, for when it is resumed."""
        write_json(self.state / f"{name}.json", value)

    def recall(self, name: str) -> dict[str, Any] | None:
        """What `remember` kept, or None."""
        path = self.state / f"{name}.json"
        return _read_json(path) if path.exists() else None

    def hidden(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The committed hidden states `[samples, tokens, hidden]`."""
        progress = self.progress
        if progress.hidden is None:
            return None
        path = self.state / progress.hidden
        try:
            hidden = open_tensor(path, shape, dtype)
        except CorruptFile as error:
            raise CorruptFile(f"{error}: {START_OVER}") from error
        if file_hash(path) != progress.hidden_hash:
            raise CorruptFile(f"{path} is damaged (its hash differs from the recorded one): {START_OVER}")
        return hidden

    def publish(self) -> None:
        """Rename the finished folder to the output; what lay there is removed only after that.

        Raises:
            RunConflict: an output appeared while the run worked, and it was not to be replaced.
            SparityError: the folder cannot be renamed; it stays complete under its working name.
        """
        self._refuse_existing()
        try:
            if os.path.lexists(self.output):
                self.output.rename(self.state / REPLACED)
            self.path.rename(self.output)
            flush_folder(self.output.parent)
        except OSError as error:
            self._put_back()
            raise SparityError(
                f"{self.path} cannot be renamed to {self.output}: {error.strerror or error}; "
                "the result in it is complete, run again with --resume to try once more"
            ) from error
        try:
            shutil.rmtree(self.output / STATE)
        except OSError as error:
            log.warning("%s could not be removed (%s): it can be deleted", self.output / STATE, error)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.output) and not self._force:
            raise RunConflict(f"{self.output} exists already: choose another output or pass --force to replace it")

    def _put_back(self) -> None:
        aside = self.state / REPLACED
        if os.path.lexists(aside) and not os.path.lexists(self.output):
            aside.rename(self.output)

    def _claim(self, identity: dict[str, Any], resume: bool) -> None:
        manifest, force = self.state / "manifest.json", self._force
        if manifest.exists() and resume:
            recorded = _read_json(manifest).get("identity")
            if not isinstance(recorded, dict):
                raise CorruptFile(f"{manifest} is damaged (it names no run): {START_OVER}")
            differing = _differences(recorded, identity)
            if not differing:
                self.resumed = True
                self._remove_leftovers()
                return
            if not force:
                raise RunConflict(
                    f"{self.path} holds an unfinished run of another recipe (different: {', '.join(differing)}): "
                    "choose another output, or start over with --force"
                )
        elif manifest.exists() and not force:
            raise RunConflict(
                f"{self.path} holds an unfinished run: continue it with --resume or start over with --force"
            )
        elif not manifest.exists() and not force and any(entry != self.state for entry in self.path.iterdir()):
            raise RunConflict(
                f"{self.path}, where the run would work, holds files of something else: choose another output, or "
                "pass --force to delete them"
            )
        for entry in self.path.iterdir():
            if entry != self.state:
                _remove(entry)
        for entry in self.state.iterdir():
            if entry.name != "lock":
                _remove(entry)
        write_json(manifest, {"identity": identity, "threads": torch.get_num_threads()})

    def _remove_leftovers(self) -> None:
        """Remove what a killed process was writing; safetensors uses temporary names of its own."""
        for folder in (self.path, self.state):
            for entry in folder.iterdir():
                if entry.name.startswith(".") and entry != self.state:
                    _remove(entry)


def _hidden_name(blocks: int) -> str:
    """The file of the hidden states behind `blocks` blocks: two take turns, so that one is always whole."""
    return f"hidden-{blocks % 2}.bin"


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if old == new else [place]


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, f": {START_OVER}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
