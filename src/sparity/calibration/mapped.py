"""Tensors in files that the system pages in and out, so that they need no memory of the process's own."""

import errno
import math
import mmap
import os
import tempfile
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from sparity.errors import CorruptFile
from sparity.files import disk_errors

PREFIX = "scratch-"
_mapped: WeakValueDictionary[int, np.memmap] = WeakValueDictionary()  # by the address where each begins


def create_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a new file of its size, its contents undefined; writing to it writes the file.

    Raises:
        SparityError: the disk is full or the folder cannot be written.
    """
    size = max(math.prod(shape), 1) * dtype.itemsize
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(descriptor, size)
            _reserve(descriptor, size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
    return open_tensor(path, shape, dtype)


def open_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that `create_tensor` made, in the same or another process.

    Raises:
        CorruptFile: the file is missing or of another size.
    """
    size = max(math.prod(shape), 1) * dtype.itemsize
    try:
        found = path.stat().st_size
        if found != size:
            raise CorruptFile(f"{path} has {found} bytes instead of {size}")
        memory = np.memmap(path, np.uint8, "r+")
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read ({error.strerror or error})") from error
    tensor = torch.from_numpy(memory)
    _mapped[tensor.data_ptr()] = memory
    return tensor.view(dtype)[: math.prod(shape)].reshape(shape)


def scratch_tensor(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros whose memory is a file in `folder` that nobody else can open; its disk space goes with it.

    Raises:
        SparityError: the disk is full or the folder cannot be written.
    """
    with disk_errors(folder / PREFIX):
        descriptor, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        os.close(descriptor)
    found = create_tensor(Path(name), shape, dtype)
    os.unlink(name)  # the mapping keeps the file, also when the process is killed in the middle
    return found


def release(tensor: Tensor) -> None:
    """Let go of the memory that a part of a mapped tensor takes; its file keeps what is in it. Others stay as they are.

    The rows between the first and the last entry of `tensor` count, also where it is a view of some columns.
    """
    begin = tensor.untyped_storage().data_ptr()
    memory = _mapped.get(begin)
    if memory is None or not tensor.numel() or not hasattr(mmap, "MADV_DONTNEED"):
        return
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr() - begin
    stop = start + span * tensor.itemsize
    start -= start % mmap.PAGESIZE
    memory._mmap.madvise(mmap.MADV_DONTNEED, start, stop - start)  # type: ignore[attr-defined]


def flush(path: Path) -> None:
    """Make what was written to the tensor in `path` durable."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Claim the disk space now: a full disk that shows only when a page is written would kill the process."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # not on this system
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not on this file system
            raise
