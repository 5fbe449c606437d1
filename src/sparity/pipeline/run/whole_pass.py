"""What passes share that hold the whole model: all shards are written at once, then every block is committed."""

import time
from collections.abc import Callable
from typing import Any

import torch

from sparity.errors import CorruptFile
from sparity.pipeline.run.pass_folder import START_OVER, PassFolder
from sparity.pipeline.run.passes import Setting, check_finished
from sparity.pipeline.run.planned import PlannedPass
from sparity.pipeline.run.progress import Progress

FOUND = "whole"


def commit_whole(
    planned: PlannedPass,
    setting: Setting,
    folder: PassFolder,
    progress: Progress,
    total: int,
    work: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Do the work of a pass, unless blocks of it are committed already, and commit all blocks.

    Args:
        planned: with one stage.
        setting: as of any pass.
        folder: of the pass.
        progress: told of the phase.
        total: blocks that the work leaves.
        work: writes every shard and gives what it found, as JSON: `changes`, a list for each block, and more.

    Returns:
        What the work found, now or before the run was interrupted.

    Raises:
        CorruptFile: a shard, or what was found, is lost.
    """
    done, seconds = folder.committed.blocks, 0.0
    if done:
        check_finished(folder.path, done, total)
    torch.set_num_threads(setting.threads)
    if not done:
        progress.phase(planned.words)
        begun = time.perf_counter()
        folder.remember(FOUND, work())
        seconds = time.perf_counter() - begun
    found = folder.recall(FOUND)
    if found is None:
        raise CorruptFile(f"{folder.state} lacks what {planned.words} did: {START_OVER}")
    for index in range(done, total):  # every shard is there
        record = {"seconds": 0.0 if index else seconds, "changes": found["changes"][index], "kept": {}}
        folder.commit(index + 1, None, record)
    return found
