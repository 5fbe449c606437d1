"""A run and its folder on every rank of a group."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from sparity.errors import RunConflict
from sparity.measure.data.machine import PACKAGES, package_version
from sparity.pipeline.run.run_folder import RunFolder, differences
from sparity.processes.group import Group
from sparity.products.choice import settled


@contextmanager
def shared(group: Group, output: Path, opened: AbstractContextManager[RunFolder]) -> Iterator[RunFolder]:
    """The folder for `output`: rank 0 holds it `opened`, locked, and writes; the others see it until it is through.

    Within the context products are of the types, and computed by the number of threads, with which the run began.
    """
    if group.first:
        with opened as folder:
            folder.group = group
            group.told((folder.finished, folder.resumed))
            yield folder
    else:
        folder = RunFolder(output)
        folder.group = group
        folder.finished, folder.resumed = group.told((False, False))
        if folder.finished:
            yield folder
        else:
            threads = torch.get_num_threads()
            torch.set_num_threads(folder.threads)
            try:
                with settled(folder.emulated_types):
                    yield folder
            finally:
                torch.set_num_threads(threads)
    group.wait()  # until rank 0 has published, or cleaned up


def agree(group: Group, work: Mapping[str, Any]) -> None:
    """Raise `RunConflict` on every rank when one is about to do other work than rank 0, or with other versions."""
    if group.size == 1:
        return
    versions = {**{name: package_version(name) for name in PACKAGES}, "python": platform.python_version()}
    found = group.collected({"versions": versions, "processor": torch.backends.cpu.get_cpu_capability(), **work})
    for rank, other in enumerate(found):
        differing = differences(found[0], other)
        if differing:
            raise RunConflict(
                f"rank {rank} differs from rank 0 in {', '.join(differing)}: start all processes with the same "
                "command, recipe and versions, on like processors"
            )
