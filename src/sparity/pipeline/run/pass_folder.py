"""The folder of one pass: the checkpoint that it writes, and how far it is.

Each finished block is a shard, committed together with the hidden states after it. Two files of hidden states take
turns, so that one is always whole.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparity.calibration.mapped import create_tensor, flush, open_tensor
from sparity.checkpoints.shards import write_tensors
from sparity.errors import CorruptFile
from sparity.files import file_hash, read_json_object, write_json
from sparity.processes.group import ALONE, Group

START_OVER = "start again with --force"


@dataclass(frozen=True)
class Committed:
    """What is final: the number of blocks, the hidden states after them (file and hash), and their records."""

    blocks: int = 0
    hidden: str | None = None
    hidden_hash: str | None = None
    records: tuple[dict[str, Any], ...] = ()


class PassFolder:
    """Where one pass works.

    Of a group of processes rank 0 alone writes; what a method writes all ranks find when it returns.

    Attributes:
        path: the folder of the checkpoint.
        state: the folder of everything that is needed to go on.
        group: the ranks that work there together; each calls the same methods in the same order.
    """

    def __init__(self, path: Path, state: Path, group: Group = ALONE) -> None:
        self.path, self.state, self.group = path, state, group

    @property
    def alone(self) -> "PassFolder":
        """The same folder for work that one rank does while the others wait."""
        return PassFolder(self.path, self.state)

    @property
    def committed(self) -> Committed:
        """What earlier processes committed."""
        path = self.state / "progress.json"
        if not path.exists():
            return Committed()
        content = read_state(path)
        try:
            found = Committed(**{**content, "records": tuple(content["records"])})
            sound = found.blocks == len(found.records) > 0
            sound = sound and all({"seconds", "changes"} <= set(record) for record in found.records)
        except (KeyError, TypeError) as error:
            raise CorruptFile(f"{path} is damaged ({error}): {START_OVER}") from error
        if not sound or found.hidden not in (None, _hidden_name(found.blocks)):
            raise CorruptFile(f"{path} is damaged (its entries contradict one another): {START_OVER}")
        return found

    def save_shard(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard of the checkpoint."""
        if self.group.first:
            write_tensors(self.path / name, tensors, {"format": "pt"})

    def room(self, blocks: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory in a file for the hidden states after `blocks` blocks; those before the last of them stay whole."""
        path = self.state / _hidden_name(blocks)
        found = create_tensor(path, shape, dtype) if self.group.first else None
        self.group.wait()
        return open_tensor(path, shape, dtype) if found is None else found

    def commit(self, blocks: int, hidden: Tensor | None, record: dict[str, Any]) -> None:
        """Make block number `blocks` final: first the hidden states in their `room`, then the record that names it."""
        name = None if hidden is None else _hidden_name(blocks)
        if name is not None:
            flush(self.state / name)
        self.group.wait()
        if self.group.first:
            digest = None if name is None else file_hash(self.state / name)
            committed = Committed(blocks, name, digest, (*self.committed.records, record))
            write_json(self.state / "progress.json", dataclasses.asdict(committed))
        self.group.wait()

    def remember(self, name: str, value: dict[str, Any]) -> None:
        """Keep something that the run found out, for when it is resumed."""
        if self.group.first:
            write_json(self.state / f"{name}.json", value)
        self.group.wait()

    def recall(self, name: str) -> dict[str, Any] | None:
        """What `remember` kept, or None."""
        path = self.state / f"{name}.json"
        return read_state(path) if path.exists() else None

    def hidden(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The committed hidden states `[samples, tokens, hidden]`."""
        committed = self.committed
        if committed.hidden is None:
            return None
        path = self.state / committed.hidden
        try:
            hidden = open_tensor(path, shape, dtype)
        except CorruptFile as error:
            raise CorruptFile(f"{error}: {START_OVER}") from error
        if file_hash(path) != committed.hidden_hash:
            raise CorruptFile(f"{path} is damaged (its hash differs from the recorded one): {START_OVER}")
        return hidden


def read_state(path: Path) -> dict[str, Any]:
    """A JSON object of a run's state; raises `CorruptFile` with what to do."""
    return read_json_object(path, f": {START_OVER}")


def _hidden_name(blocks: int) -> str:
    """The file of the hidden states after `blocks` blocks."""
    return f"hidden-{blocks % 2}.bin"
