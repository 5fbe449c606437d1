"""Where a model's tensors come from: a module in memory, or safetensors shards read one tensor at a time."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparity.checkpoints import legacy_sparse, packed
from sparity.checkpoints.shards import CODES, check_header
from sparity.checkpoints.weight_files import weight_files
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats.conversions.compressed_tensors import PARTS
from sparity.formats.storage.values import aligned


class Source(ABC):
    """Tensors by name."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each stored tensor; a tied copy is not listed."""

    @abstractmethod
    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU or where the module holds them."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the weights change, cheap to compute."""

    @abstractmethod
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name and type of each stored tensor."""


class ModuleSource(Source):
    """The tensors of a model in memory. It is read, never written."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = {}
        seen = set()
        for name, tensor in module.state_dict().items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and place in seen:
                continue  # tied to a tensor that is already listed
            seen.add(place)
            self._tensors[name] = tensor.detach()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """See `Source.dtypes`."""
        return {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """See `Source.read`."""
        return {name: self._tensors[name] for name in names}

    def fingerprint(self) -> str:
        """A hash of every tensor's shape and of a sample of its values."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors.items():
            sample = tensor.flatten()[:: max(1, tensor.numel() // 1024)].float().cpu()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()


class OutlineSource(Source):
    """The shapes of a model that is not there yet; nothing can be read."""

    def __init__(self, skeleton: nn.Module) -> None:
        tied = set(skeleton.all_tied_weights_keys)  # type: ignore[arg-type]  # empty when nothing is tied
        state = skeleton.state_dict()
        self._tensors = {name: tensor for name, tensor in state.items() if name not in tied}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """See `Source.dtypes`."""
        return {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """There is nothing to read."""
        raise InvalidInput("this model has shapes only: its weights come into being when the stages before it have run")

    def fingerprint(self) -> str:
        """A hash of names and shapes."""
        return hashlib.sha256(json.dumps(sorted(self.shapes().items())).encode()).hexdigest()


class CheckpointSource(Source):
    """The weights of a Hugging Face folder, plain or packed, see `weight_files`. Files are open only while they are
    read. A packed matrix NAME shows as the dense tensor NAME.weight, unpacked when it is read, and so does a weight in
    an orphaned layout.

    Attributes:
        rescued: the orphaned layout that config.json names, see `legacy_sparse.layout_of`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = weight_files(folder)
        self.packed, listed, self._shards = files.packed, files.listed, files.shards
        layout = legacy_sparse.layout_of(folder)
        self.rescued = None if self.packed else layout
        self.matrices: dict[str, packed.StoredMatrix] = {}  # of a packed folder, by the name that each stands for
        self.unused: set[str] = set()  # of a packed folder, what it names as of no use for the model
        self._made: dict[str, packed.StoredMatrix | legacy_sparse.Rescued] = {}  # what is not stored as it is shown
        self._homes: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for path in self._shards:
            for name, shape, dtype in read_header(path):
                if self.packed and (name in self._homes or (listed or {}).get(name) != path.name):
                    raise CorruptFile(f"{path}: {name} is there twice, or not where the index says; fetch it again")
                self._homes[name], self._shapes[name], self._dtypes[name] = path, shape, dtype
        absent = sorted(set(listed or ()) - set(self._homes))
        if absent:
            raise CorruptFile(
                f"{folder}: the index lists {len(absent)} tensors that no shard holds, {absent[0]} among them; "
                "fetch or save the model again"
            )
        if self.packed:
            for path in self._shards:
                self._stand_in(found := {matrix.stored: matrix for matrix in packed.matrices(path).values()})
                self.matrices.update(found)
                self.unused |= packed.unused(path)
        elif self.rescued in PARTS:
            headers = {name: (self._shapes[name], self._dtypes[name]) for name in self._homes}
            self._stand_in(legacy_sparse.find(self.rescued, self._homes, headers))

    def _stand_in(self, found: Mapping[str, packed.StoredMatrix | legacy_sparse.Rescued]) -> None:
        """Show matrices as the tensors that they stand for, in place of their parts."""
        for stored, matrix in found.items():
            for part in matrix.parts:
                for known in (self._homes, self._shapes, self._dtypes):
                    known.pop(part, None)
            if stored in self._shapes:
                raise CorruptFile(f"{self.folder}: {stored} is there twice, as it is and packed")
            self._made[stored], self._shapes[stored], self._dtypes[stored] = matrix, matrix.shape, matrix.dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`."""
        return dict(self._shapes)

    def dtypes(self) -> dict[str, torch.dtype]:
        """See `Source.dtypes`."""
        return dict(self._dtypes)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """See `Source.read`."""
        tensors = {name: self._made[name].weight() for name in names if name in self._made}
        names = [name for name in names if name not in self._made]
        for path in sorted({self._homes[name] for name in names}):
            try:
                with safe_open(path, framework="pt") as file:
                    here = [name for name in names if self._homes[name] == path]
                    tensors.update({name: aligned(file.get_tensor(name)) for name in here})
            except (SafetensorError, OSError) as error:
                raise CorruptFile(f"{path} changed or vanished while it was read ({error})") from error
        return tensors

    def fingerprint(self) -> str:
        """A hash of the shards' names, sizes, change times and headers."""
        digest = hashlib.sha256()
        for path in self._shards:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        digest.update(json.dumps(sorted(self._shapes.items())).encode())
        return digest.hexdigest()


def read_header(path: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and type of each tensor of a safetensors file.

    Raises:
        CorruptFile: the file is missing, truncated or no safetensors file.
        InvalidInput: a tensor of a quantised type.
    """
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            entries = []
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                entries.append((name, tuple(part.get_shape()), _dtype(part.get_dtype(), path, name)))
            return entries
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} is truncated or damaged ({error}); fetch or save it again") from error


def _dtype(code: str, path: Path, name: str) -> torch.dtype:
    known = {name: dtype for dtype, name in CODES.items()}
    if code not in known:
        raise InvalidInput(f"{path}: {name} is stored as {code}; start from the model's unquantised weights")
    return known[code]


def main_dtype(source: Source) -> torch.dtype:
    """The floating type that most stored numbers have."""
    shapes, counts = source.shapes(), dict[torch.dtype, int]()
    for name, dtype in source.dtypes().items():
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + torch.Size(shapes[name]).numel()
    if not counts:
        raise InvalidInput("the model holds no floating-point tensors")
    return max(counts, key=lambda dtype: counts[dtype])
