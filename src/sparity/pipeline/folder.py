"""The folder of a run: what is finished, what it belongs to, and who is writing to it.

A run works in `OUT.partial`. Each finished block is a shard of the final checkpoint, committed together with the
hidden states behind it; `OUT` appears, complete, by one rename at the end.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparity.errors import CorruptFile, RunConflict
from sparity.files import flush_folder, lock, write_atomically, write_json

STATE = ".sparity"
FINISHED = "sparity.json"


@dataclass(frozen=True)
class Progress:
    """What is committed: the number of blocks, the file of the hidden states behind them, and their records."""

    blocks: int = 0
    hidden: str | None = None
    records: tuple[dict[str, Any], ...] = ()


class RunFolder:
    """The working folder of one run, locked while it is used."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self.state = self.path / STATE

    @classmethod
    @contextmanager
    def open(cls, output: Path, identity: dict[str, Any], force: bool, resume: bool) -> Iterator["RunFolder"]:
        """Create or continue the working folder for `output`.

        Raises:
            RunConflict: the output exists, another run holds the folder, or the folder belongs to another run.
        """
        folder = cls(output)
        if output.exists() and not force:
            raise RunConflict(f"{output} exists already: choose another output or pass --force to replace it")
        folder.state.mkdir(parents=True, exist_ok=True)
        with lock(folder.state / "lock"):
            folder._claim(identity, force, resume)
            yield folder

    @property
    def progress(self) -> Progress:
        """What earlier runs committed."""
        path = self.state / "progress.json"
        if not path.exists():
            return Progress()
        content = _read_json(path)
        return Progress(content["blocks"], content["hidden"], tuple(content["records"]))

    @property
    def threads(self) -> int:
        """The thread count under which the run began; results are reproducible bit by bit only with the same."""
        threads: int = _read_json(self.state / "manifest.json")["threads"]
        return threads

    def save_shard(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write one shard of the checkpoint."""
        _save_tensors(self.path / name, tensors)

    def commit(self, blocks: int, hidden: Tensor | None, record: dict[str, Any]) -> None:
        """Make block number `blocks` final: first the hidden states, then the record that points to them."""
        previous = self.progress
        name = None
        if hidden is not None:
            name = f"hidden-{blocks % 2}.safetensors"
            _save_tensors(self.state / name, {"hidden": hidden})
        progress = Progress(blocks, name, (*previous.records, record))
        write_json(self.state / "progress.json", dataclasses.asdict(progress))

    def hidden(self) -> Tensor | None:
        """The committed hidden states `[samples, tokens, hidden]`."""
        name = self.progress.hidden
        if name is None:
            return None
        try:
            hidden: Tensor = load_file(self.state / name)["hidden"]
        except (SafetensorError, OSError, KeyError) as error:
            raise CorruptFile(f"{self.state / name} is damaged ({error}): start again with --force") from error
        return hidden

    def publish(self) -> None:
        """Rename the finished folder to the output; what lay there is removed only after that."""
        shutil.rmtree(self.state)
        replaced = None
        if self.output.exists():
            replaced = self.output.with_name(self.output.name + ".replaced")
            if replaced.exists():
                _remove(replaced)
            self.output.rename(replaced)
        self.path.rename(self.output)
        flush_folder(self.output.parent)
        if replaced is not None:
            _remove(replaced)

    def _claim(self, identity: dict[str, Any], force: bool, resume: bool) -> None:
        manifest = self.state / "manifest.json"
        if manifest.exists() and resume:
            differing = _differences(_read_json(manifest)["identity"], identity)
            if not differing:
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
        for entry in self.path.iterdir():
            if entry != self.state:
                _remove(entry)
        for entry in self.state.iterdir():
            if entry.name != "lock":
                _remove(entry)
        write_json(manifest, {"identity": identity, "threads": torch.get_num_threads()})


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


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
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path} is damaged ({error}): start again with --force") from error
    return content


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
