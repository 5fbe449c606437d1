"""A group of ranks as forks of the test's process, which need not import anything again."""

import io
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from sparity.processes.group import ALONE
from sparity.processes.ranks import Ranks

PATIENCE = 120  # seconds


def in_ranks(size, work):
    """What `work(group)` gives on each rank, in order, or the error that it raised; None of a rank that was killed."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(size)]
        started = [
            context.Process(target=_rank, args=(rank, size, work, Path(folder) / "store", ends[rank][1]), daemon=True)
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for _, end in ends:
            end.close()
        found = [_received(end) for end, _ in ends]
        for process in started:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                raise TimeoutError("a rank hangs")
    return found


def _rank(rank, size, work, store, end):
    torch.set_num_threads(1)  # a pool of threads does not survive the fork
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        group = ALONE if size == 1 else Ranks(dist.FileStore(str(store), size), rank, size)
        with group:
            found = work(group)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        found = error
    content = io.BytesIO()
    torch.save(found, content)
    end.send_bytes(content.getvalue())
    end.close()


def _received(end):
    try:
        return torch.load(io.BytesIO(end.recv_bytes()), weights_only=False) if end.poll(PATIENCE) else "it hangs"
    except EOFError:
        return None
