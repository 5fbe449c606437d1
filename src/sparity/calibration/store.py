"""Statistics of a dense model on disk, a file per block, so that they need to be gathered only once.

    STORE/statistics.json                 what they belong to, which there are, and the hash of every file
    STORE/statistics-00000.safetensors    raw sums of block 0: `SUM.SITE`, and `tokens.SITE`, `sequences.SITE`
    STORE/gradients-0.safetensors         its gradients of the loss, where they were asked for
    STORE/regional-gradients-0.safetensors  those of its own output

What is stored of a raw sum, and under which names, its statistic says; one in several parts lies there as
`SUM.SITE.PART`, such as the panels of a Gram matrix.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparity import registry
from sparity.calibration.gradients import read_gradients
from sparity.calibration.input_statistics.base import Statistic, statistic
from sparity.calibration.statistics import GRADIENTS, REGIONAL, Statistics
from sparity.checkpoints.shards import write_tensors
from sparity.errors import CorruptFile, InvalidInput, RunConflict
from sparity.files import file_hash, read_json_object, write_json
from sparity.models import Block, Decoder, InputSite

FORMAT = 1
MANIFEST = "statistics.json"
DAMAGED = ": delete the store, or gather it anew in another folder"


class StatisticsStore:
    """A folder of statistics that `close` has completed; while it is gathered, `save` fills it block by block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[str, str] = {}
        self._checked: set[str] = set()
        self.needs: frozenset[str] = frozenset()

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> "StatisticsStore":
        """The finished store of a model, its type and its calibration tokens.

        Raises:
            RunConflict: the folder is no store, or one of something else.
            CorruptFile: its manifest is damaged.
        """
        if not (folder / MANIFEST).is_file():
            raise RunConflict(f"{folder} exists and is no statistics store: choose another folder")
        content = read_json_object(folder / MANIFEST, DAMAGED)
        if content.get("format") != FORMAT:
            raise InvalidInput(f"{folder} has format {content.get('format')!r}; this release reads format {FORMAT}")
        recorded, needs, hashes = (content.get(key) for key in ("identity", "needs", "files"))
        if not isinstance(recorded, dict) or not isinstance(needs, list) or not isinstance(hashes, dict):
            raise CorruptFile(f"{folder / MANIFEST} is damaged{DAMAGED}")
        known = {*registry.names("statistic"), *GRADIENTS, REGIONAL}
        if unknown := [need for need in needs if not isinstance(need, str) or need not in known]:
            raise CorruptFile(
                f"{folder / MANIFEST} is damaged, or of a package that is not installed (no statistic is called "
                f"{unknown[0]!r}){DAMAGED}"
            )
        differing = sorted(key for key in {*recorded, *identity} if recorded.get(key) != identity.get(key))
        if differing:
            raise RunConflict(f"{folder} holds statistics of another {' and '.join(differing)}: choose another folder")
        store = cls(folder)
        store.needs, store._hashes = frozenset(needs), hashes
        return store

    def refuse_others(self) -> None:
        """Raise `RunConflict` when the folder holds files of something else: gathering anew would remove them."""
        others = sorted(path.name for path in self.folder.iterdir() if path.name not in {MANIFEST, *self._hashes})
        if others:
            raise RunConflict(f"{self.folder} is to be gathered anew and holds other files, {others[0]} among them")

    def save(self, index: int, gathered: Mapping[str, Statistics]) -> None:
        """Write the statistics of block `index` by the names of its input sites."""
        tensors: dict[str, Tensor] = {}
        for key, tensor in (entry for site, statistics in gathered.items() for entry in _stored(site, statistics)):
            if key in tensors:
                raise InvalidInput(f'two statistics are stored as "{key}": give one of them another `stored_as`')
            tensors[key] = tensor
        write_tensors(self.folder / _name(index), tensors)

    def save_regional(self, index: int, gradients: Mapping[str, Tensor]) -> None:
        """Write the gradients of the norm of block `index`'s output by projection."""
        write_tensors(self.folder / _regional(index), {f"{REGIONAL}.{name}": part for name, part in gradients.items()})

    def close(self, identity: Mapping[str, Any], needs: Collection[str]) -> None:
        """Write the manifest over all that was saved: the store is complete."""
        files = sorted(self.folder.glob("*.safetensors"))
        content = {
            "format": FORMAT,
            "identity": dict(identity),
            "needs": sorted(needs),
            "files": {path.name: file_hash(path) for path in files},
        }
        write_json(self.folder / MANIFEST, content)

    def read(self, block: Block, site: InputSite) -> Statistics:
        """The statistics of an input site of a block, on the block's device.

        Raises:
            CorruptFile: the block's file is missing or not what was written.
        """
        path = self._sound(_name(block.index))
        device = next(block.module.parameters()).device
        width = site.projections[0].weight.shape[1]
        statistics = Statistics.gather(site.name, self.needs - {*GRADIENTS, REGIONAL})
        try:
            with safe_open(path, framework="pt") as file:
                statistics.tokens = int(file.get_tensor(f"tokens.{site.name}"))
                statistics.sequences = int(file.get_tensor(f"sequences.{site.name}"))
                for name in sorted(statistics.needs) if statistics.tokens else ():
                    read = partial(_read, file, statistic(name), site.name)
                    statistics.sums[name] = statistic(name).restore(read, width).to(device)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptFile(f"{path} is damaged ({error}){DAMAGED}") from error
        expected = {name: statistic(name).empty(width, "meta") for name in statistics.sums}
        fits = all(
            (total.shape, total.dtype) == (expected[name].shape, expected[name].dtype)
            for name, total in statistics.sums.items()
        )
        if not fits or statistics.tokens < 0 or (statistics.tokens and statistics.sequences < 1):
            raise CorruptFile(f"{path} is damaged (the sums of {site.name} do not fit it){DAMAGED}")
        return statistics

    def tokens(self, index: int) -> dict[str, int]:
        """How many tokens each input site of block `index` saw; of an expert's site, how many were routed to it."""
        path = self._sound(_name(index))
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("tokens.")]  # noqa: SIM118 - not a mapping
                return {name.removeprefix("tokens."): int(file.get_tensor(name)) for name in names}
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{path} is damaged ({error}){DAMAGED}") from error

    def gradients(self, block: Block, needs: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """Projection -> statistic -> `[out, in]`, in float32 on the block's device."""
        found: dict[str, dict[str, Tensor]] = {}
        of_loss = set(needs) & set(GRADIENTS)
        files = [(f"gradients-{block.index}.safetensors", of_loss), (_regional(block.index), set(needs) - of_loss)]
        for name, wanted in files:
            if wanted:
                for projection, parts in read_gradients(self._sound(name), block, wanted).items():
                    found.setdefault(projection, {}).update(parts)
        return found

    def _sound(self, name: str) -> Path:
        """The path of a file whose hash is the recorded one; each is checked once."""
        path = self.folder / name
        if name not in self._checked:
            if not path.is_file() or file_hash(path) != self._hashes.get(name):
                raise CorruptFile(f"{path} is missing or damaged (its hash differs from the recorded one){DAMAGED}")
            self._checked.add(name)
        return path


def store_bytes(decoder: Decoder, needs: Collection[str]) -> int:
    """The size of a store of these statistics, gradients not counted, without the headers of its files."""
    sites = [site for index in range(len(decoder)) for site in decoder.sites(index)]
    widths = Counter(site.projections[0].weight.shape[1] for site in sites)
    of_inputs = [statistic(need) for need in set(needs) - {*GRADIENTS, REGIONAL}]
    return sum(found.nbytes(width) * count for found in of_inputs for width, count in widths.items())


def _name(index: int) -> str:
    return f"statistics-{index:05d}.safetensors"


def _regional(index: int) -> str:
    return f"regional-gradients-{index}.safetensors"


def _stored(site: str, statistics: Statistics) -> Iterator[tuple[str, Tensor]]:
    yield f"tokens.{site}", torch.tensor(statistics.tokens)
    yield f"sequences.{site}", torch.tensor(statistics.sequences)
    for name, total in statistics.sums.items():
        for part, tensor in statistic(name).stored(total).items():
            yield _key(statistic(name), site, part), tensor


def _read(file: Any, counted: Statistic, site: str, part: str) -> Tensor:
    tensor: Tensor = file.get_tensor(_key(counted, site, part))
    return tensor


def _key(counted: Statistic, site: str, part: str) -> str:
    return ".".join([counted.stored_as or counted.name, site, *([part] if part else [])])
