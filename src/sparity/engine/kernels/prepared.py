"""A packed weight with the back ends that multiply it, each number of inputs by the one that `choose` picks."""

from collections.abc import Callable, Mapping
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.engine.kernels.choice import Case, Choice, choose, default_timer, density_step
from sparity.engine.kernels.gemv import cpu, pytorch
from sparity.engine.kernels.native_weight import NativeWeight, declines
from sparity.engine.kernels.prefill.cpu import prefill
from sparity.engine.kernels.timing import Call, Timer
from sparity.errors import InvalidInput
from sparity.formats import Packed, format_of
from sparity.products.panels import linear

GEMV, PREFILL, PYTORCH = "gemv", "prefill", "pytorch"
BATCHES = (1, 4, cpu.MOST_TOKENS)  # where timings are made; a batch in between goes by the next one above
MANY = 128  # beyond the last of BATCHES: what larger batches are looked up under
Route = Callable[[Tensor], Tensor]


class Prepared:
    """A weight that can be called with inputs.

    Attributes:
        packed: the weight as it lies in memory, once.
        native: the same where the compiled kernels read it; None when they do not run.
        declined: why the compiled kernels do not run, or None when they do.
        handle: a number that `prepared_at` finds it by, as long as something else holds it.
    """

    def __init__(self, packed: Packed, timer: Timer | None = None) -> None:
        self.declined = declines(packed)
        if self.declined:
            format_of(packed).check(packed)
        self.native = None if self.declined else NativeWeight(packed)
        self.packed = self.native.packed if self.native else packed
        self._timer = timer
        self.handle = next(_handles)
        _by_handle[self.handle] = self
        self._chosen: dict[tuple[int, int], tuple[Choice, Route]] = {}  # by batch of `BATCHES` and threads

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., columns] in the weight's type -> `[..., rows]`."""
        rows = x.reshape(-1, x.shape[-1])
        choice, route = self._decided(len(rows))
        if choice.winner == PREFILL and self._skipping_pays(rows, choice):
            route = self._route(GEMV)
        return route(rows).reshape(*x.shape[:-1], self.packed.shape[0])

    def each_alone(self, x: Tensor) -> Tensor:
        """The same, and up to `MANY` inputs each give the bits that they give alone: by `gemv`, whatever is faster."""
        rows = x.reshape(-1, x.shape[-1])
        if self.native is None or len(rows) > MANY:
            return self(x)
        out = torch.cat([cpu.gemv(self.native, part) for part in torch.split(rows, cpu.MOST_TOKENS)])
        return out.reshape(*x.shape[:-1], self.packed.shape[0])

    def choice(self, batch: int) -> Choice:
        """What multiplies so many inputs (`gemv`, `prefill` or `pytorch`), and why; timed at the first call."""
        return self._decided(batch)[0]

    def _skipping_pays(self, rows: Tensor, choice: Choice) -> bool:
        """Whether, of full inputs, prefill is faster, but the channels that these inputs share are few enough."""
        seconds = {candidate.name: candidate.seconds for candidate in choice.candidates}
        gemv, prefill = seconds.get(GEMV), seconds.get(PREFILL)
        if gemv is None or prefill is None or not format_of(self.packed).by_channel:
            return False
        used = int((rows != 0).any(0).sum())
        return gemv * used < prefill * rows.shape[1]

    def _decided(self, batch: int) -> tuple[Choice, Route]:
        key = next((size for size in BATCHES if batch <= size), MANY), native.threads()
        if key not in self._chosen:
            found = self._choose(*key)
            self._chosen[key] = found, self._route(found.winner)
        return self._chosen[key]

    def _choose(self, batch: int, threads: int) -> Choice:
        return choose(
            case_of(self.packed, batch, threads),
            self._offered(batch),
            lambda names: self._calls(names, batch),
            rule=GEMV if batch <= cpu.MOST_TOKENS else PREFILL,
            timer=self._timer if self._timer else default_timer(),
        )

    def _offered(self, batch: int) -> dict[str, str | None]:
        """Route -> why it cannot multiply so many inputs, or None."""
        few = None if batch <= cpu.MOST_TOKENS else f"for at most {cpu.MOST_TOKENS} inputs"
        same = "nothing to unpack: PyTorch does the same" if self.packed.plain else None
        if batch == 1 and format_of(self.packed).by_channel:
            same = "reads the channels that are skipped too"
        return {
            GEMV: self.declined or few,
            PREFILL: self.declined or same,
            PYTORCH: None if self.packed.plain or self.declined else "unpacks the weight for each call",
        }

    def _calls(self, names: list[str], batch: int) -> Mapping[str, Call]:
        x = torch.randn(batch, self.packed.shape[1], generator=torch.Generator().manual_seed(0)).to(self.packed.dtype)

        def call(route: Route) -> Call:
            return lambda: route(x)

        return {name: call(self._route(name)) for name in names}

    def _route(self, name: str) -> Route:
        weight, packed = self.native, self.packed
        if weight is not None and name == GEMV:
            return lambda x: cpu.gemv(weight, x)
        if weight is not None and name == PREFILL:
            return lambda x: prefill(weight, x)
        if packed.plain:
            return lambda x: linear(x, packed.tensors["values"])
        return lambda x: pytorch.gemv(packed, x)


_handles = count()
_by_handle: WeakValueDictionary[int, Prepared] = WeakValueDictionary()


def prepared_at(handle: int) -> Prepared:
    """The prepared weight of a handle.

    Raises:
        InvalidInput: it is gone, or there never was one.
    """
    found = _by_handle.get(handle)
    if found is None:
        raise InvalidInput(f"no packed weight has the handle {handle}: what was compiled for it must be compiled again")
    return found


def case_of(packed: Packed, batch: int, threads: int) -> Case:
    """What the timing of a packed weight holds for."""
    rows, columns = packed.shape
    kept = packed.tensors["values"].numel() * (2 if packed.encoding.half_bytes else 1)
    density = density_step(min(kept, rows * columns), rows * columns)
    values, bits = packed.encoding.words(packed.dtype), packed.encoding.bits(packed.dtype)
    return Case(rows, columns, packed.format, values, density, batch, threads, bits)


def prepare(packed: Packed, timer: Timer | None = None) -> Prepared:
    """Make a packed weight ready to multiply; `timer` takes the clock's place.

    Raises:
        CorruptFile: it contradicts itself.
    """
    return Prepared(packed, timer)
