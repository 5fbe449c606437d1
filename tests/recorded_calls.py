"""Calls of the compiled kernels with all memory that they reach, to be made again on another processor.

Addresses reach the library through `Tensor.data_ptr` and `ctypes.addressof`. While calls are recorded, both remember
what they were asked for, so that every pointer is known to lie in a tensor or a structure. `csrc/tests/replay.cpp`
reads the file of calls.
"""

import ctypes
import struct
import subprocess
from bisect import bisect_right, insort
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from sparity.engine.kernels import native


@dataclass(eq=False)
class Memory:
    """The storage of a tensor, or a structure of the library, whose owner is kept alive."""

    base: int
    size: int
    owner: object
    dtype: torch.dtype | None  # None: a structure

    def contents(self):
        return ctypes.string_at(self.base, self.size)

    def pointers(self):
        """Offsets of pointers within it."""
        return [] if self.dtype is not None else list(_pointers(type(self.owner), 0))


@dataclass
class Call:
    """One call: what it was given, the memory that it reached, and what was in there before and after."""

    name: str
    arguments: list[tuple[int, bytes, int]]  # kind (1: a place in a block), 8 bytes, offset
    blocks: list[Memory]
    pointers: list[tuple[int, int, int, int]]
    before: list[bytes]
    status: int
    after: list[bytes]


def _pointers(kind, offset):
    if issubclass(kind, ctypes.Structure):
        for name, part in kind._fields_:
            yield from _pointers(part, offset + getattr(kind, name).offset)
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointers(kind._type_, offset + i * ctypes.sizeof(kind._type_))
    elif kind is ctypes.c_void_p:
        yield offset


class Recorder:
    """The library of this processor, which keeps what it is called with."""

    def __init__(self, library):
        self.calls = []
        self._library, self._memory, self._bases = library, {}, []

    def __getattr__(self, name):
        return lambda *given: self._make(name, getattr(self._library, name), given)

    def know(self, owner):
        """Remember a tensor's storage or a structure."""
        if isinstance(owner, torch.Tensor):
            storage = owner.untyped_storage()
            found = Memory(storage.data_ptr(), storage.nbytes(), owner, owner.dtype)
        else:
            found = Memory(_addressof(owner), ctypes.sizeof(owner), owner, None)
        if found.size and found.base not in self._memory:
            insort(self._bases, found.base)
        if found.size:
            self._memory[found.base] = found

    def _find(self, address):
        at = bisect_right(self._bases, address)
        found = self._memory[self._bases[at - 1]] if at else None
        assert found is not None and address <= found.base + found.size, "a pointer to unknown memory"  # noqa: PT018
        return found

    def _make(self, name, function, given):
        blocks, pointers = [], []

        def place(address):
            found = self._find(address)
            if found not in blocks:
                blocks.append(found)
            return blocks.index(found), address - found.base

        arguments = []
        for kind, value in zip(function.argtypes, given, strict=True):
            if kind is ctypes.c_void_p and value is not None:
                value = getattr(value, "_obj", value)
                if not isinstance(value, int):
                    self.know(value)
                    value = _addressof(value)
                block, offset = place(value)
                arguments.append((1, struct.pack("<q", block), offset))
            else:
                arguments.append((0, struct.pack("<d" if kind is ctypes.c_float else "<q", value or 0), 0))
        for number, block in enumerate(blocks):  # grows while it is read
            for offset in block.pointers():
                target = ctypes.c_void_p.from_address(block.base + offset).value
                if target is not None:
                    pointers.append((number, offset, *place(target)))
        before = [block.contents() for block in blocks]
        status = function(*given)
        after = [block.contents() for block in blocks]
        self.calls.append(Call(name, arguments, blocks, pointers, before, status or 0, after))
        return status


_addressof = ctypes.addressof


@contextmanager
def recorded(isa, threads=1):
    """A list to which every call of the library within the context is added; it runs with `isa`."""
    plain = torch.Tensor.data_ptr
    with native.using(isa), pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(native.library())

        def data_ptr(tensor):
            recorder.know(tensor)
            return plain(tensor)

        def addressof(owner):
            recorder.know(owner)
            return _addressof(owner)

        patch.setattr(torch.Tensor, "data_ptr", data_ptr)
        patch.setattr(ctypes, "addressof", addressof)
        patch.setattr(native, "library", lambda: recorder)
        patch.setattr(native, "threads", lambda: threads)
        yield recorder.calls


def write(calls, path):
    """The file that `replay` reads."""
    with path.open("wb") as out:

        def words(*numbers):
            out.write(struct.pack(f"<{len(numbers)}q", *numbers))

        words(len(calls))
        for call in calls:
            words(len(call.name))
            out.write(call.name.encode())
            words(len(call.arguments))
            for kind, value, offset in call.arguments:
                out.write(struct.pack("<q8sq", kind, value, offset))
            words(len(call.blocks))
            for block, contents in zip(call.blocks, call.before, strict=True):
                words(block.size, block.dtype is not None)
                out.write(contents)
            words(len(call.pointers))
            for pointer in call.pointers:
                words(*pointer)


def replay(calls, program, isa, folder):
    """Make the calls again with the command `program` and `isa` -> of each its status and what its tensors hold."""
    write(calls, folder / "calls")
    command = [*program, isa, str(folder / "calls"), str(folder / "results")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    results = (folder / "results").read_bytes()
    found, at = [], 0
    for call in calls:
        status = struct.unpack_from("<q", results, at)[0]
        at += 8
        contents = []
        for block in call.blocks:
            size = block.size if block.dtype is not None else 0
            contents.append(results[at : at + size])
            at += size
        found.append((status, contents))
    assert at == len(results), f"{len(results)} bytes of results, not {at}"
    return found


def differences(calls, found):
    """Sentences on what is not the same bits; any NaN is another one's equal."""
    said = []
    for number, (call, (status, contents)) in enumerate(zip(calls, found, strict=True)):
        if status != call.status:
            said.append(f"call {number}, {call.name}: {status} instead of {call.status}")
        for block, wanted, got in zip(call.blocks, call.after, contents, strict=True):
            if block.dtype is None or wanted == got:
                continue
            first, second = (torch.frombuffer(bytearray(data), dtype=block.dtype) for data in (wanted, got))
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[block.dtype.itemsize]
            other = (first.view(bits) != second.view(bits)) & ~(first.isnan() & second.isnan())
            if other.any():
                at = int(other.nonzero()[0])
                sample = f"number {at} is {second[at].item()!r} instead of {first[at].item()!r}"
                said.append(f"call {number}, {call.name}: {int(other.sum())} of {len(other)} differ, {sample}")
    return said
