"""The peak memory of one contender, in a process of its own: nothing of another is counted."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sparity.errors import SparityError
from sparity.measure.data.machine import watch_peak_memory
from sparity.measure.timing.contenders import Contender
from sparity.measure.timing.generation import prompts, time_generation


def peak_memory(contender: Contender, batches: Sequence[int], prompt: int, tokens: int) -> dict[int, int]:
    """Peak resident bytes while a fresh process generates, by batch size, once the model is loaded.

    Raises:
        SparityError: the process ended without a result, such as for want of memory.
    """
    task = [
        contender.name,
        str(contender.folder),
        contender.how,
        list(batches),
        prompt,
        tokens,
        torch.get_num_threads(),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "sparity.measure.timing.peak_memory", json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SparityError(
            f"bench: the process that measures the memory of {contender.name} ended with code {done.returncode}: {said}"
        )
    return {int(batch): peak for batch, peak in json.loads(done.stdout.splitlines()[-1]).items()}


def _measure(task: str) -> dict[int, int]:
    name, folder, how, batches, prompt, tokens, threads = json.loads(task)
    torch.set_num_threads(threads)
    model = Contender(name, Path(folder), how).open()
    peaks = {}
    for batch in batches:
        ids = prompts(torch.arange(prompt) % model.config.get_text_config().vocab_size, batch, prompt)
        with watch_peak_memory() as peak:
            time_generation(model, ids, tokens)
            peaks[batch] = peak()
    return peaks


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(sys.argv[1])) + "\n")
